"""Time the order arithmetic: `python tests/bench/bench_order.py` prints one JSON line. Medians of many runs."""

from __future__ import annotations

import json
import time

import numpy as np

from shards.order import sample_numbers

NUM_SAMPLES = 10**9
NUM_RUNS = 200


def median_ms(positions_K: np.ndarray) -> float:
    times_s: list[float] = []
    for _ in range(NUM_RUNS):
        start_s = time.perf_counter()
        sample_numbers(0, NUM_SAMPLES, positions_K)
        times_s.append(time.perf_counter() - start_s)
    return round(float(np.median(times_s)) * 1000, 4)


def main() -> None:
    across_epochs_K = NUM_SAMPLES - 2048 + np.arange(4096)
    result = {
        "num_samples": NUM_SAMPLES,
        "positions_4096_ms": median_ms(np.arange(4096)),
        "positions_4096_over_two_epochs_ms": median_ms(across_epochs_K),
        "position_1_ms": median_ms(np.array([123_456_789_012])),
        "limits_ms": {"positions_4096": 5.0, "position_1": 1.0},
    }
    result["passed"] = (
        max(result["positions_4096_ms"], result["positions_4096_over_two_epochs_ms"]) <= 5.0
        and result["position_1_ms"] <= 1.0
    )
    print(json.dumps(result))
    raise SystemExit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
