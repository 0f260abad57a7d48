"""Time that translation's searches take for each token, with keys and values kept and without.

    python -m benchmarks.decoding --dataset=bible_en_es

With the cache a token costs one row of attention; without it the whole decoder runs over all tokens so far, by the same
weights, and only the last one gets its logits. Both find the same tokens, which is printed. Weights are random, and END
is impossible before the limit, so that every translation is as long as asked. The two take turns, after a round of
warm-up; printed are medians with 95% intervals (benchmarks.measuring).
"""

import sys
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from apps import runner
from apps.text import decoder, pieces, search, translation
from benchmarks import measuring

_TOKENS = {"start": pieces.START, "end": pieces.END, "pad": pieces.PAD, "alpha": 0.6}


def main() -> None:
    """Runs the program."""
    """Runs the program."""
    names = runner.define_flags(translation.TASK, flags.FLAGS)
    flags.FLAGS.set_default("dtype_policy", "float32")
    flags.FLAGS.set_default("batch_size", 8)
    flags.DEFINE_multi_integer("length", [16, 32, 64, 128], "Tokens of the translations, with END; again for more.", 2)
    flags.DEFINE_integer("rounds", 30, "Measured rounds, 30 or more for a claim.", 2)
    app.run(lambda argv: sys.exit(runner.exit_code(lambda argv: _run(flags.FLAGS, names), argv)))


def _run(values: flags.FlagValues, names: list[str]) -> None:
    options = runner.options_of(values, names)
    data = runner.load(translation.TASK, options)
    measuring.warn_if_busy(load := measuring.load())
    texts = next(iter(data.test))[0]["text"]
    model = runner.build(translation.TASK, options, data)
    raw = tf.function(translation.serve(model, data)[0], autograph=False)(texts)
    print(f"{options.plan.default}, batch {len(texts)}, {values.rounds} rounds; load {load:.1f} before")
    print("search tokens | ms per token, cache | ms per token, whole | whole / cache | same tokens")
    for search_name, settings in (("greedy", {}), ("beam", {"beam_size": options.beam_size})):
        makers = (("cache", decoder.token_by_token), ("whole", whole))
        searches = {name: _searching(getattr(search, search_name), make, model, settings) for name, make in makers}
        for length in values.length:
            times, same = _measure(searches, raw, tf.fill([len(texts)], length), values.rounds)
            each = {name: measuring.median(1000 * values / length) for name, values in times.items()}
            ratio = measuring.paired_ratio(times["whole"], times["cache"])
            print(f"{search_name:6} {length:4} | {each['cache']} | {each['whole']} | {ratio} | {100 * same:.2f}%")


def _searching(find, make, model: keras.Model, settings: dict):
    def run(raw, limits):
        step, state = make(model, raw["encoded"], raw["source_ids"])

        def endless(token_ids, index, state):
            log_probs, state = step(token_ids, index, state)
            is_early = (tf.range(tf.shape(log_probs)[1]) == pieces.END) & (index + 1 < limits[0])
            return tf.where(is_early, -float("inf"), log_probs), state

        return find(endless, state, limits, **_TOKENS, **settings)[0]

    return tf.function(run, autograph=False)


def _measure(searches, raw, limits: tf.Tensor, rounds: int) -> tuple[dict[str, np.ndarray], float]:
    """Seconds of each, and the share of tokens that are the same."""
    seconds, same = {name: [] for name in searches}, []
    for _ in range(1 + rounds):
        found = {}
        for name, run in searches.items():
            start = time.perf_counter()
            found[name] = run(raw, limits).numpy()
            seconds[name].append(time.perf_counter() - start)
        same.append(np.mean(found["cache"] == found["whole"]))
    return {name: np.array(values[1:]) for name, values in seconds.items()}, min(same)


def whole(model: keras.Model, encoded: tf.Tensor, source_ids: tf.Tensor) -> tuple[search.Step, tf.Tensor]:
    """Returns the decoder as a step that runs over all tokens so far, and none of them."""
    places = [model.get_layer("encoder_norm").output, model.input["source_ids"], model.input["target_ids"]]
    over_all = keras.Model(places, model.get_layer("decoder_norm").output)
    keys = model.get_layer("lexicon").project(encoded)

    def step(token_ids, index, before):
        tokens = tf.concat([before, token_ids[:, tf.newaxis]], axis=1)
        beam_size = tf.shape(tokens)[0] // tf.shape(encoded)[0]
        sources = (tf.repeat(side, beam_size, axis=0) for side in (encoded, source_ids))
        decoded = over_all([*sources, tokens], training=False)[:, -1:]
        return decoder.log_probs(model, decoded, keys, source_ids), tokens

    return step, tf.zeros([tf.shape(encoded)[0], 0], tf.int32)


if __name__ == "__main__":
    main()
