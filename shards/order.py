"""The order of a run as pure arithmetic: position -> (epoch, sample). No I/O, no state, nothing that grows with N.

    step, micro step, rank  ->  clip numbers q          rank_clips
    clip number q           ->  position, draw          clip_places
    position p              ->  epoch p // N, sample π(seed, epoch)(p mod N)      sample_numbers
    a failing sample        ->  the next candidate                                substitute
    (seed, epoch, sample, draw, purpose)  ->  numbers in [0, 1)                   uniform

π is a keyed permutation of 0..N-1: a Feistel network over the bits of N-1, walked until it lands below N
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). All random numbers here are blake2b and
splitmix64 (Steele, Lea, Flood 2014), written out, so that they stay the same over versions of every library.

Legend: K positions, R rounds, B clips.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1
"""Changes whenever the same seed would give another order; a cursor of another version is refused."""

NUM_ROUNDS = 12
FILLER = -1
"""The clip number that fills up a last micro step: it stands for no position and weighs nothing."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_30, _SHIFT_27, _SHIFT_31 = np.uint64(30), np.uint64(27), np.uint64(31)


def sample_numbers(
    seed: int,
    num_samples: int,
    positions_K: NDArray[np.int64],
    *,
    run_length: int = 1,
    first_position: int = 0,
    first_epoch: int = 0,
    source: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Say which sample each position takes, and in which epoch it lies.

    Every epoch (N positions in a row) holds every sample exactly once, in an order of its own. The cost is O(1)
    per position in time and memory whatever N is; whole batches are cheapest. `positions_K` must not be before
    `first_position`, where epoch `first_epoch` begins (a data set that grew begins anew there); each `source` of a
    mixture has orders of its own. Returns two int64 arrays of the shape of `positions_K`: epochs and samples.

    With `run_length` r the samples come in runs of r neighbours, which one read can fetch: it is the runs that are
    permuted. Runs begin at multiples of r of the position itself, in every epoch, so that batches whose size is a
    multiple of r never cut one. Where an epoch begins or ends amid a run, and where r does not divide N, the walk
    below finds another place for the few samples concerned.
    """
    positions_K = np.asarray(positions_K, dtype=np.int64)
    passed_K = positions_K - first_position
    epoch_K = passed_K // num_samples
    index_K = passed_K - epoch_K * num_samples
    tweak_K = (epoch_K + first_epoch).astype(np.uint64)
    key = _hash64(b"order", seed, source) if source else _hash64(b"order", seed)
    if run_length == 1:
        sample_K = _permute(index_K.astype(np.uint64), _round_keys(key, tweak_K), num_samples).astype(np.int64)
    else:
        shift_K = (first_position + epoch_K * num_samples) % run_length
        sample_K = _permute_runs(index_K, shift_K, key, tweak_K, num_samples, run_length)
    return epoch_K + first_epoch, sample_K


def uniform(seed: int, *, epoch: int, sample: int, draw: int, purpose: str, size: int) -> NDArray[np.float64]:
    """Draw `size` numbers in [0, 1) that depend on nothing but the arguments (contract C3).

    The same on every rank, machine and library version. `purpose` ("frames", "crop", "masked_frame", ...) keeps the
    draws of one clip independent of each other. A shorter draw is the beginning of a longer one.
    """
    key = _hash64(b"draw", seed, epoch, sample, draw, text=purpose)
    counter = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    return (_mix(counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def substitute(seed: int, num_samples: int, position: int, wanted: int, attempt: int) -> int:
    """Name the sample to take at `position` instead of `wanted` when that one fails.

    Attempts 0, 1, ... N-2 name every other sample exactly once, never the failing one (with N = 1 there is no
    other, and sample 0 comes back). The candidates of different positions are unrelated, so that a bad stretch
    is not replaced by one and the same sample.
    """
    if num_samples == 1:
        return 0
    num_others = num_samples - 1
    keys_RK = _round_keys(_hash64(b"substitute", seed), np.array([position], dtype=np.uint64))
    candidate = int(_permute(np.array([attempt % num_others], dtype=np.uint64), keys_RK, num_others)[0])
    return candidate + 1 if candidate >= wanted else candidate


def slot_order(seed: int, phase: int, cycle: int, num_slots: int) -> NDArray[np.int64]:
    """Permute the slots of one cycle of a mixture: int64 [num_slots] (see shards/mixture.py)."""
    keys_RK = _round_keys(_hash64(b"mixture", seed, phase), np.array([cycle], dtype=np.uint64))
    return _permute(np.arange(num_slots, dtype=np.uint64), keys_RK, num_slots).astype(np.int64)


def num_micro_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro steps that every rank takes per step: the last one may hold fillers."""
    return -(-global_batch // (micro_batch * world_size))


def rank_clips(
    step: int, micro_step: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> NDArray[np.int64]:
    """Give the clip numbers of one micro batch of one rank: int64 [micro_batch], FILLER where the step has no more.

    Clip i of step k has number k * global_batch + i. A rank takes one stretch of the step, its micro steps one after
    the other, so that neighbours in the order are read by one rank; any world size and micro batch cut the same
    global batch. Fillers are at its end.
    """
    num_steps = num_micro_steps(global_batch, micro_batch, world_size)
    index_B = (rank * num_steps + micro_step) * micro_batch + np.arange(micro_batch, dtype=np.int64)
    return np.where(index_B < global_batch, step * global_batch + index_B, FILLER)


def clip_places(clips_B: NDArray[np.int64], clips_per_video: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Turn clip numbers into (positions, draws): a position yields `clips_per_video` clips in a row.

    A FILLER keeps position FILLER and draw 0.
    """
    real_B = clips_B >= 0
    return np.where(real_B, clips_B // clips_per_video, FILLER), np.where(real_B, clips_B % clips_per_video, 0)


def _hash64(kind: bytes, *numbers: int, text: str = "") -> int:
    """Hash whole numbers (any that fit 64 bits with a sign) and a text into 64 bits."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers) + text.encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8, person=kind).digest(), "little")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64: a bijection of 64 bits in which every input bit moves every output bit."""
    values = (values ^ (values >> _SHIFT_30)) * _MIX_1
    values = (values ^ (values >> _SHIFT_27)) * _MIX_2
    return values ^ (values >> _SHIFT_31)


def _round_keys(key: int, tweak_K: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Derive the keys of all rounds from a 64-bit key and one tweak (epoch or position) each: uint64 [R, K].

    Where all tweaks are equal, which is nearly always, the result is [R, 1].
    """
    if tweak_K.size and (tweak_K == tweak_K[0]).all():
        tweak_K = tweak_K[:1]
    tweak_key_K = _mix(_mix(tweak_K * np.uint64(_GOLDEN) + np.uint64(key)) ^ np.uint64(key))
    counter_R1 = np.arange(1, NUM_ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(_GOLDEN)
    return _mix(counter_R1 + tweak_key_K)


def _permute(index_K: NDArray[np.uint64], keys_RK: NDArray[np.uint64], num_samples: int) -> NDArray[np.uint64]:
    """Permute numbers below `num_samples`: walk the Feistel cycle of each until it is below it again.

    The network permutes [0, 2**bits) with 2**bits < 2 * num_samples, so that a walk takes fewer than two
    rounds on average; the walk of a number that starts below num_samples must come back below it.
    """
    bits = (num_samples - 1).bit_length()
    result_K = _feistel(index_K, keys_RK, bits)
    outside = np.flatnonzero(result_K >= num_samples)
    while outside.size:
        keys_RO = keys_RK if keys_RK.shape[1] == 1 else keys_RK[:, outside]
        walked_O = _feistel(result_K[outside], keys_RO, bits)
        result_K[outside] = walked_O
        outside = outside[walked_O >= num_samples]
    return result_K


def _permute_runs(
    index_K: NDArray[np.int64],
    shift_K: NDArray[np.int64],
    key: int,
    tweak_K: NDArray[np.uint64],
    num_samples: int,
    run_length: int,
) -> NDArray[np.int64]:
    """Permute runs of neighbours; an epoch begins `shift` places after the beginning of a run.

    Index i stands at place x = i + shift of a whole number of runs, M places in all. Permuting whole runs is a
    permutation f of 0..M-1. M - N numbers of its result are no samples, and as many places are no indices: the walk
    leads from the k-th of those numbers to the k-th of these places, and on with f, until it meets a sample.
    """
    sample_K = np.empty_like(index_K)
    num_runs_K = -(-(num_samples + shift_K) // run_length)
    for num_runs in np.unique(num_runs_K).tolist():  # two values at most: the shift is shorter than a run
        mine = np.flatnonzero(num_runs_K == num_runs)
        place, shift, tweak = index_K[mine] + shift_K[mine], shift_K[mine], tweak_K[mine]
        while mine.size:
            keys_RK = _round_keys(key, tweak)
            run = _permute((place // run_length).astype(np.uint64), keys_RK, num_runs).astype(np.int64)
            found = run * run_length + place % run_length
            sample_K[mine] = found
            over = found - num_samples
            outside = over >= 0
            place = np.where(over < shift, over, found)[outside]
            mine, shift, tweak = mine[outside], shift[outside], tweak[outside]
    return sample_K


def _feistel(index_K: NDArray[np.uint64], keys_RK: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Permute [0, 2**bits): the rounds change the low half by the high half and the other way round in turn."""
    low_bits = bits // 2
    high_bits = bits - low_bits
    low_K = index_K & np.uint64((1 << low_bits) - 1)
    high_K = index_K >> np.uint64(low_bits)
    for round_number in range(NUM_ROUNDS):
        if round_number % 2 == 0:
            low_K = low_K ^ _top_bits(_mix(high_K + keys_RK[round_number]), low_bits)
        else:
            high_K = high_K ^ _top_bits(_mix(low_K + keys_RK[round_number]), high_bits)
    return (high_K << np.uint64(low_bits)) | low_K


def _top_bits(values: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Keep the `bits` highest bits (a shift by 64 is undefined in numpy, hence the case of none)."""
    return values >> np.uint64(64 - bits) if bits else np.zeros_like(values)
