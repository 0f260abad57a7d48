"""Translation by a copy of the source and by a table of phrases: what a network must beat to be worth its electricity.

    python -m benchmarks.phrase_table --dataset=bible_en_es
    python -m benchmarks.phrase_table --dataset=gnome_docs/de --source=en --target=de

Copy: the source as it is. Phrase table: IBM model 1 in both directions, symmetrised by growing the intersection
(grow-diag); phrases of up to four words that agree with the alignment; relative frequencies and lexical weights, both
directions of each; and a bigram model of the target language (Kneser and Ney, one discount). Phrases keep the source's
order, and dynamic programming finds the best ones. Sources are in small letters, targets keep theirs; a word that the
table doesn't know is copied. Weights are the Moses toolkit's own before any tuning, and none is tuned here.

All that runs over the training part is numpy: its texts stand one behind the other as numbers of words, with 0 in
front, between and behind. A place is an index into that.

Sources: Brown et al. 1993, J93-2003 (model 1); Koehn, Och and Marcu 2003, N03-1017, sections 3.1 and 4.4 (symmetrised
alignments, phrases, lexical weights); Kneser and Ney 1995, ICASSP (bigrams); weights of
https://github.com/moses-smt/mosesdecoder/blob/9d176ce7b5211f3d80fe465601dfdcda347a2530/scripts/training/train-model.perl
"""

import functools
import heapq
import itertools
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import app, flags

from apps import runner, sets
from apps.text import texts, translation
from apps.text.lexicon import Numbered, ibm_model_1, make_grid

_LONGEST_LINE = 80  # words in a training text; as Moses' manual calls clean-corpus-n.perl
_LONGEST = 4  # words in a phrase; Koehn et al., section 4.3: more than three hardly help
_TABLE_WEIGHT, _MODEL_WEIGHT, _PHRASE_BONUS, _WORD_BONUS = 0.2, 0.5, 0.2, 1.0
_OPTIONS = 20  # translations of a phrase that are tried; Moses' ttable-limit
_BEAM = 10  # last words that are followed at each place
_DISCOUNT = 0.75  # of a bigram's count; Church and Gale 1991 measured it
_COPIED = -100.0  # Moses' score of an unknown word
_JOINER = "\uffed"  # on the side of a mark where there is no space, as OpenNMT's tokenizer has it
_TIE = 1e-3  # lets the nearest of equal words win, and hardly changes another choice
_FAR = 2**40  # no place


def main() -> None:
    """Runs the program."""
    flags.DEFINE_string("dataset", "bible_en_es", "Set of texts in two languages: a TFDS name.")
    flags.DEFINE_string("data_dir", None, "Folder of prepared data sets. Default: TFDS's.")
    flags.DEFINE_string("source", None, "Language to translate from. Default: English, of a set with two languages.")
    flags.DEFINE_string("target", None, "Language to translate to. Default: the other one.")
    app.run(lambda argv: sys.exit(runner.exit_code(lambda argv: _run(flags.FLAGS), argv)))


def _run(options: flags.FlagValues) -> None:
    languages = translation.choose_languages(options, sets.describe(options).info.features)
    builder = sets.prepare(options)
    splits = sets.split_names(builder)
    train, *held_out = (
        [[line.decode(errors="replace") for line in side] for side in texts.read(builder, split, languages)]
        for split in splits
    )
    translator = Translator(*train)
    for part, (sources, references) in zip(("validation", "test"), held_out, strict=True):
        for name, translate in (("copy", str), ("phrase table", translator)):
            line = translation.in_words(translation.compare([translate(source) for source in sources], references))
            print(f"{options.dataset}, {'-'.join(languages)}, {part}, {name}: {line}", flush=True)


# Words


def tokenize(text: str) -> list[str]:
    """Returns words and marks; a mark says on which sides it touches, so that nothing but kinds of spaces is lost."""
    tokens = []
    for match in re.finditer(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", text):
        token, start, end = match[0], *match.span()
        if not re.match(r"\w", token):
            before, after = text[max(start - 1, 0) : start], text[end : end + 1]
            token = _JOINER * bool(before.strip()) + token + _JOINER * bool(re.match(r"\w", after))
        tokens.append(token)
    return tokens


def detokenize(tokens: Sequence[str]) -> str:
    """Returns the text of words and marks."""
    return re.sub(f" {_JOINER}|{_JOINER} |{_JOINER}", "", " ".join(tokens))


def number(lines: Sequence[Sequence[str]], numbers: dict[str, int]) -> Numbered:
    """Returns texts as numbers, from 1; words that aren't in `numbers` get the next ones."""
    words = [0]
    for line in lines:
        words += [numbers.setdefault(word, len(numbers) + 1) for word in line]
        words.append(0)
    lengths = np.array([len(line) for line in lines])
    return Numbered(np.array(words), np.cumsum(lengths + 1) - lengths, lengths, len(numbers) + 1)


# Alignment


def align(source: Numbered, target: Numbered) -> tuple[np.ndarray, np.ndarray]:
    """Returns places in the source and in the target that belong together, int64 `[points]` each."""
    grid = make_grid(source, target)
    sides = [_relative(side)[places] for side, places in ((source, grid.source_places), (target, grid.target_places))]
    nearness = 1.0 - _TIE * np.abs(sides[0] - sides[1]).astype("float32")
    to_source = _best(target.words, grid.target_places, grid.source_places, grid.pair, grid.source_words, nearness)
    to_target = _best(source.words, grid.source_places, grid.target_places, grid.pair, grid.target_words, nearness)
    return grow_diag(to_source, to_target)


def _relative(side: Numbered) -> np.ndarray:
    """Where in its text each place is, 0 to 1."""
    found = np.zeros(len(side.words), "float32")
    found[side.words > 0] = np.concatenate([(np.arange(length) + 0.5) / length for length in side.lengths])
    return found


def _best(words, places, others, pair, given, nearness) -> np.ndarray:
    """The other place that explains each place best, -1 where none does; of equal words the nearest one."""
    likely, alone = ibm_model_1(words, places, pair, given)
    likely = likely[pair] * nearness
    best = alone[words]
    np.maximum.at(best, places, likely)
    chosen = likely == best[places]
    found = np.full(len(words), -1)
    found[places[chosen]] = others[chosen]
    return found


def grow_diag(to_source: np.ndarray, to_target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points that both directions have, grown by neighbours that one has and that align a new word.

    Args:
        to_source: place in the source of each place in the target, or -1.
        to_target: place in the target of each place in the source, or -1.
    """
    width = len(to_source)
    forward = (to_source * width + np.arange(width))[to_source >= 0]
    backward = (np.arange(len(to_target)) * width + to_target)[to_target >= 0]
    points = np.intersect1d(forward, backward).tolist()
    others = set(forward.tolist()).symmetric_difference(backward.tolist())
    in_source, in_target = bytearray(len(to_target)), bytearray(width)
    for point in points:
        in_source[point // width] = in_target[point % width] = True
    neighbours = [step for row in (-width, 0, width) for step in (row - 1, row, row + 1) if step]
    for point in points:  # it grows; a point needs one look, as words don't lose their alignment again
        for near in map(point.__add__, neighbours):
            if near in others and not (in_source[near // width] and in_target[near % width]):
                in_source[near // width] = in_target[near % width] = True
                others.remove(near)
                points.append(near)
    return np.divmod(np.array(points, "int64"), width)


# Phrases


def extract(sources: np.ndarray, targets: np.ndarray, source_words: np.ndarray, target_words: np.ndarray) -> np.ndarray:
    """Returns all phrases that agree with an alignment: no word of theirs is aligned with one outside.

    Args:
        sources: places in the source, `[points]`.
        targets: places in the target, `[points]`.
        source_words: `[places]`.
        target_words: `[places]`.

    Returns:
        First place and number of words, of the source and of the target, int64 `[phrases, 4]`.
    """
    low, high = _reach(sources, targets, source_words)
    reach = list(_widened(*_reach(targets, sources, target_words)))
    lowest, highest = (np.stack(column) for column in zip(*reach, strict=True))
    free = (np.bincount(targets, minlength=len(target_words)) == 0) & (target_words > 0)
    before, after = _run_lengths(free), _run_lengths(free[::-1])[::-1]
    found = []
    for length, (first, last) in enumerate(_widened(low, high), 1):
        (start,) = np.nonzero((first <= last) & (last - first < _LONGEST))
        first, last = first[start], last[start]
        inside = (lowest[last - first, first] >= start) & (highest[last - first, first] < start + length)
        start, first, last = start[inside], first[inside], last[inside]
        for left in range(_LONGEST):
            for right in range(_LONGEST - left):
                wide = last - first + 1 + left + right
                fits = (wide <= _LONGEST) & (before[first - 1] >= left) & (after[last + 1] >= right)
                found.append(np.stack([start, np.full_like(start, length), first - left, wide], axis=1)[fits])
    return np.concatenate(found)


def _reach(places, others, words) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last place that each place is aligned with; none for free words, all for what is no word."""
    low, high = np.full(len(words), _FAR), np.full(len(words), -_FAR)
    np.minimum.at(low, places, others)
    np.maximum.at(high, places, others)
    return np.where(words > 0, low, -_FAR), np.where(words > 0, high, _FAR)


def _widened(low, high):
    """The reach of one place, of it and the next one, and so on."""
    first, last = low, high
    for ahead in range(1, _LONGEST + 1):
        yield first, last
        first = np.minimum(first, np.append(low[ahead:], [-_FAR] * ahead))
        last = np.maximum(last, np.append(high[ahead:], [_FAR] * ahead))


def _run_lengths(free: np.ndarray) -> np.ndarray:
    """How many places up to this one are free in a row."""
    index = np.arange(len(free))
    return index - np.maximum.accumulate(np.where(free, -1, index))


def lexical_weights(places, others, words: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Returns the logarithm of how likely each word is given those it is aligned with, on their average; `[places]`.

    A phrase's lexical weight is the sum over its words, since all that they are aligned with is inside.
    """
    keys = given[others] * (words.max() + 1) + words[places]
    _, pair, counts = np.unique(keys, return_inverse=True, return_counts=True)
    likely = counts[pair] / np.bincount(given[others])[given[others]]
    num = np.bincount(places, minlength=len(words))
    weights = np.bincount(places, likely, minlength=len(words)) / np.maximum(num, 1)
    free = (num == 0) & (words > 0)
    weights[free] = (np.bincount(words[free], minlength=1) / max(np.sum(free), 1))[words[free]]
    return np.log(np.where(words > 0, weights, 1.0))


class Ngrams:
    """Numbers for all runs of one to four words of a text."""

    def __init__(self, words: np.ndarray, size: int):
        self._size, self._keys = size, []
        for keys in self._grow(words):
            self._keys.append(np.unique(keys[keys >= 0]))
        self.offsets = np.cumsum([0, *map(len, self._keys)])

    def __call__(self, words: np.ndarray) -> np.ndarray:
        """Returns the number of what begins at each place, -1 where it is unknown or no run; int64 `[4, places]`."""
        found = np.full([_LONGEST, len(words)], -1)
        for length, keys in enumerate(self._grow(words)):
            found[length] = np.where(keys >= 0, self._find(length, keys) + self.offsets[length], -1)
        return found

    def _grow(self, words):
        """What tells runs of one word, of two, and so on apart; a known shorter run's number and a word."""
        keys = np.where((words > 0) & (words < self._size), words, -1)
        for length in range(_LONGEST):
            if length:
                shorter = self._find(length - 1, keys)
                following = np.append(words[length:], np.zeros(length, words.dtype))[: len(words)]
                known = (keys >= 0) & (following > 0) & (following < self._size)
                keys = np.where(known, shorter * self._size + following, -1)
            if len(self._keys) > length:
                known = np.append(self._keys[length], -1)[self._find(length, keys)] == keys
                keys = np.where(known, keys, -1)
            yield keys

    def _find(self, length, keys):
        return np.searchsorted(self._keys[length], keys)


class Table(NamedTuple):
    """Phrases of the source and their translations, sorted by number and by score from the best on, `[entries]`.

    Attributes:
        sources: numbers of the source's phrases.
        places: where a translation stands in the training part.
        lengths: its words.
        scores: the sum of the logarithms of frequencies and lexical weights.
    """

    sources: np.ndarray
    places: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray


def make_table(phrases: np.ndarray, sources: np.ndarray, targets: np.ndarray, weights: Sequence[np.ndarray]) -> Table:
    """Scores phrases.

    Args:
        phrases: as `extract` returns them.
        sources: numbers of the source's runs, as `Ngrams` returns them.
        targets: the target's.
        weights: lexical weights of the source's words and of the target's.
    """
    source, target = sources[phrases[:, 1] - 1, phrases[:, 0]], targets[phrases[:, 3] - 1, phrases[:, 2]]
    keys, first, pair, counts = np.unique(
        source * (targets.max() + 1) + target, return_index=True, return_inverse=True, return_counts=True
    )
    source, target = np.divmod(keys, targets.max() + 1)
    score = sum(np.log(counts / np.bincount(side, counts)[side]) for side in (source, target))
    for side, each in zip((phrases[:, :2], phrases[:, 2:]), weights, strict=True):
        sums = np.concatenate([[0.0], np.cumsum(each)])
        best = np.full(len(keys), -np.inf)  # Koehn et al.: of several alignments, the highest
        np.maximum.at(best, pair, sums[side.sum(axis=1)] - sums[side[:, 0]])
        score += best
    lengths = phrases[first, 3]
    order = np.lexsort([-score, source])
    return Table(source[order], phrases[first, 2][order], lengths[order], score[order])


# Translation


class Bigrams:
    """The logarithm of a word's probability behind another one; 0 is the end and the beginning of a text.

    Args:
        words: a text's numbers, `[places]`.
        size: the numbers are below it; those that the text doesn't have count as rare words.
    """

    def __init__(self, words: np.ndarray, size: int):
        pairs, counts = np.unique(words[:-1] * size + words[1:], return_counts=True)
        before, after = np.divmod(pairs, size)
        totals = np.bincount(before, counts, minlength=size)
        rest = np.where(totals > 0, _DISCOUNT * np.bincount(before, minlength=size) / np.maximum(totals, 1), 1.0)
        alone = (np.bincount(after, minlength=size) + 1) / (len(pairs) + size)
        likely = (counts - _DISCOUNT) / totals[before] + rest[before] * alone[after]
        self._size, self._seen = size, dict(zip(pairs.tolist(), np.log(likely).tolist(), strict=True))
        self._rest, self._alone = np.log(rest).tolist(), np.log(alone).tolist()

    def __call__(self, before: int, after: int) -> float:
        """Returns the logarithm."""
        found = self._seen.get(before * self._size + after)
        return self._rest[before] + self._alone[after] if found is None else found


class _Option(NamedTuple):
    score: float
    first: int
    last: int
    words: tuple[str, ...]


class Translator:
    """Learns a table of phrases and a model of the target language, and translates by them.

    Args:
        sources: texts of the training part.
        targets: their translations.

    Raises:
        AppError: no pair has words on both sides.
    """

    def __init__(self, sources: Sequence[str], targets: Sequence[str]):
        pairs = [(tokenize(source.lower()), tokenize(target)) for source, target in zip(sources, targets, strict=True)]
        kept = [pair for pair in pairs if all(0 < len(side) <= _LONGEST_LINE for side in pair)]
        if len(kept) < len(pairs):
            reason = f"empty, or longer than {_LONGEST_LINE} words"
            runner.say(f"{len(pairs) - len(kept):,} of {len(pairs):,} training pairs are left out: {reason}")
        if not kept:
            raise runner.AppError("no training pair is left; choose another --dataset")
        self._source_numbers, self._target_numbers = {}, {}
        source = number([pair[0] for pair in kept], self._source_numbers)
        target = number([pair[1] for pair in kept], self._target_numbers)
        small = number([[word.lower() for word in pair[1]] for pair in kept], {})
        points = align(source, small)
        weights = [
            lexical_weights(*points, source.words, small.words),
            lexical_weights(*points[::-1], small.words, source.words),
        ]
        phrases = extract(*points, source.words, small.words)
        self._ngrams = Ngrams(source.words, source.size)
        target_runs = Ngrams(target.words, target.size)(target.words)
        self._table = make_table(phrases, self._ngrams(source.words), target_runs, weights)
        self._target, self._target_words = target.words, ["", *self._target_numbers]
        self._model = Bigrams(target.words, target.size + 1)  # one more: what is copied and unknown
        self._cached_options = functools.cache(self._options)

    def __call__(self, source: str) -> str:
        """Returns the translation."""
        words = tokenize(source)
        numbers = np.array([self._source_numbers.get(word.lower(), 0) for word in words] + [0])
        runs, beams = self._ngrams(numbers).tolist(), [{} for _ in range(len(words) + 1)]
        beams[0][0] = 0.0, None, ()
        for start, word in enumerate(words):
            beam, ways = heapq.nlargest(_BEAM, beams[start].items(), key=lambda item: item[1][0]), {}
            for length in range(1, min(_LONGEST, len(words) - start) + 1):
                options = self._cached_options(runs[length - 1][start]) or [self._copy(word)] * (length == 1)
                self._extend(beam, ways, options, beams[start + length])
        ends = beams[-1]
        path = ends[max(ends, key=lambda last: ends[last][0] + _MODEL_WEIGHT * self._model(last, 0))]
        found = []
        while path is not None:
            found, path = [*path[2], *found], path[1]
        return detokenize(found)

    def _extend(self, beam, ways: dict, options: Sequence[_Option], following: dict) -> None:
        """Puts the best path that ends in each word into `following`; `ways` has the best path to each first word."""
        for score, first, last, words in options:
            if first not in ways:
                scores = [path[0] + _MODEL_WEIGHT * self._model(before, first) for before, path in beam]
                best = max(scores)
                ways[first] = best, beam[scores.index(best)][1]
            so_far, path = ways[first]
            score += so_far
            if last not in following or score > following[last][0]:
                following[last] = score, path, words

    def _options(self, run: int) -> list[_Option]:
        """The best translations of a run of the source."""
        if run < 0:
            return []
        first, last = np.searchsorted(self._table.sources, [run, run + 1])
        options = []
        for entry in range(first, min(last, first + _OPTIONS)):
            place = self._table.places[entry]
            words = self._target[place : place + self._table.lengths[entry]].tolist()
            inner = sum(self._model(*pair) for pair in itertools.pairwise(words))
            score = _TABLE_WEIGHT * float(self._table.scores[entry]) + _MODEL_WEIGHT * inner
            score += _PHRASE_BONUS + _WORD_BONUS * len(words)
            options.append(_Option(score, words[0], words[-1], tuple(self._target_words[word] for word in words)))
        return options

    def _copy(self, word: str) -> _Option:
        known = self._target_numbers.get(word, len(self._target_words))
        return _Option(_COPIED, known, known, (word,))


if __name__ == "__main__":
    main()
