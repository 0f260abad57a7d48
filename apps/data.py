"""Fetches and prepares data sets.

    python -m apps.data --dataset=mnist_5k,fashion_mnist

An app does this by itself when its data set isn't there yet; this program does it beforehand. What is there already
is left alone; a killed run goes on with the file that it was fetching.
"""

import sys

import tensorflow_datasets as tfds
from absl import flags

from apps import runner
from tfhalf import datasets


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    flags.DEFINE_list(
        "dataset",
        None,
        "Data sets, separated by commas: TFDS names, or mnist_5k, deepforest, blue_marble, composites, reuters_r8, "
        "reuters_r52, newsgroups_20, vader_movies, vader_tweets, vader_amazon, vader_nyt, bible_en_es, gnome_docs/de, "
        "gnome_docs/fr, gnome_docs/ru, fillets_cs, fillets_nl, gcin_tones, fillets_noisy, spoken_words_en.",
        flag_values=values,
        required=True,
    )
    flags.DEFINE_string(
        "data_dir", None, "Folder for them. Default: TFDS's, ~/tensorflow_datasets.", flag_values=values
    )


def main() -> None:
    """Runs the program."""
    runner.start(define_flags, _run)


def _run(values: flags.FlagValues) -> None:
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    for name in values.dataset:  # a misspelt name is told before the first hour of downloads
        datasets.describe(name, values.data_dir)
    for name in values.dataset:
        builder = datasets.prepare(name, values.data_dir, runner.say)
        splits = ", ".join(f"{split} {about.num_examples:,}" for split, about in builder.info.splits.items())
        runner.say(f"{name}: {splits}; {builder.info.dataset_size} in {builder.data_path}")
        runner.say(f"  {' '.join(builder.info.description.split())}")


if __name__ == "__main__":
    main()
