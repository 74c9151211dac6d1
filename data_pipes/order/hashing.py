"""Keyed hashes and permutations of integers: equal on every machine, in every process and version of numpy.

Enters: integers. Leaves: hashed words, uniform numbers, permuted indices, each computed for itself alone. Why it
exists: the streams of `np.random` are not promised across versions, and a drawn permutation costs memory for every
element.

splitmix64: Steele et al., "Fast splittable pseudorandom number generators", 2014. Feistel networks with cycle walking:
Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64s = NDArray[np.int64]
Uint64s = NDArray[np.uint64]

WEYL_INCREMENT = 0x9E3779B97F4A7C15
"""The step of splitmix64's counter: 2**64 divided by the golden ratio, made odd."""
_ROUNDS = 4
"""Rounds of a Feistel network."""
_UNIFORM_TAG = 0x756E69666F726D
"""Keeps `hash_uniform` apart from every other use of the same seed."""


def finalise64(word: Any, shift_right: Callable[[Any, int], Any], constant: Callable[[int], Any]) -> Any:
    """The finaliser of splitmix64, a bijection of 64-bit words, for any type whose products keep the lowest 64 bits.

    Args:
        word: one word or an array of words.
        shift_right: the logical right shift of a 64-bit word of that type.
        constant: turns an integer in [0, 2**64) into that type.

    Returns:
        The mixed words; only their lowest 64 bits count where the type has more.
    """
    word = (word ^ shift_right(word, 30)) * constant(0xBF58476D1CE4E5B9)
    word = (word ^ shift_right(word, 27)) * constant(0x94D049BB133111EB)
    return word ^ shift_right(word, 31)


def mix64(value: Uint64s) -> Uint64s:
    """The output function of splitmix64, a bijection of 64-bit words; for arrays only, as numpy warns of scalars."""
    mixed: Uint64s = finalise64(value + np.uint64(WEYL_INCREMENT), _shift_right, np.uint64)
    return mixed


def _shift_right(word: Uint64s, count: int) -> Uint64s:
    return word >> np.uint64(count)


def hash_words(*parts: ArrayLike) -> Uint64s:
    """Hashes integers, or arrays of them that broadcast against each other, into 64-bit words, [B] or of more
    dimensions.
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        word = np.asarray(part & 0xFFFFFFFFFFFFFFFF if isinstance(part, int) else part).astype(np.uint64)
        state = mix64(state ^ word)
    return state


def hash64(*parts: int) -> int:
    """One 64-bit hash of integers; negative ones count modulo 2**64."""
    return int(hash_words(*parts)[0])


def hash_uniform(seed: int, positions: ArrayLike, draw: int, n: int) -> NDArray[np.float64]:
    """Uniform numbers for each position, a pure function of (seed, position, draw).

    Args:
        seed: any integer, taken modulo 2**64.
        positions: int64 [B].
        draw: tells independent uses apart; 0 is the augmentation.
        n: how many numbers for each position.

    Returns:
        float64 [B, n] in [0, 1), multiples of 2**-53.
    """
    rows = hash_words(seed, _UNIFORM_TAG, draw, np.atleast_1d(np.asarray(positions, np.int64)))
    words = mix64(rows[:, None] ^ mix64(np.arange(n, dtype=np.uint64)))
    return np.asarray((words >> np.uint64(11)) * 2.0**-53, np.float64)


def feistel(index: ArrayLike, size: ArrayLike, key: Uint64s) -> Int64s:
    """A keyed permutation of [0, size), evaluated at `index`.

    Args:
        index: [B], 0 <= index < size.
        size: one for all or [B], up to 2**53.
        key: one for all or [B]. Elements with equal size and key belong to one permutation.

    Returns:
        The image of each index, int64 [B].
    """
    return _walk(index, size, key, _feistel_rounds)


def feistel_inverse(image: ArrayLike, size: ArrayLike, key: Uint64s) -> Int64s:
    """The index that `feistel` sends to `image`.

    Args:
        image: [B], 0 <= image < size.
        size: see `feistel`.
        key: see `feistel`.
    """
    return _walk(image, size, key, _feistel_rounds_back)


def _walk(
    start: ArrayLike, size: ArrayLike, key: Uint64s, rounds: Callable[[Uint64s, Uint64s, Sequence[Uint64s]], Uint64s]
) -> Int64s:
    """Applies `rounds` until the value is back in the domain, which is expected to take 4 times at most; with the
    rounds of the inverse, the same cycle is walked the other way round.

    Args:
        start: [B], in the domain.
        size: of the domain, one for all or [B].
        key: one for all or [B].
        rounds: a permutation of the words of 2 * half bits, given the words, `half` and the keys of its rounds.
    """
    out: Uint64s = np.atleast_1d(np.asarray(start).astype(np.uint64))
    sizes: Uint64s = np.asarray(size).astype(np.uint64)
    if sizes.ndim and len(sizes) == 1:
        sizes = sizes[0]
    bits = np.frexp((sizes - np.uint64(1)).astype(np.float64))[1]
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    round_keys = [mix64(np.atleast_1d(key) ^ np.uint64(number)) for number in range(1, _ROUNDS + 1)]
    out = rounds(out, half, round_keys)
    outside = np.nonzero(out >= sizes)[0]
    while len(outside):
        walked = rounds(out[outside], _pick(half, outside), [_pick(k, outside) for k in round_keys])
        out[outside] = walked
        outside = outside[walked >= _pick(sizes, outside)]
    return out.astype(np.int64)


def _feistel_rounds(value: Uint64s, half: Uint64s, round_keys: Sequence[Uint64s]) -> Uint64s:
    """A permutation of the words of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for key in round_keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return (left << half) | right


def _feistel_rounds_back(value: Uint64s, half: Uint64s, round_keys: Sequence[Uint64s]) -> Uint64s:
    """The inverse of `_feistel_rounds`."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left: Uint64s = value >> half
    right: Uint64s = value & mask
    for key in reversed(round_keys):
        left, right = right ^ (mix64(left ^ key) & mask), left
    return (left << half) | right


def _pick(values: Uint64s, chosen: NDArray[np.intp]) -> Uint64s:
    """The chosen elements of values that are one for all or [B]."""
    return values[chosen] if values.ndim and len(values) > 1 else values
