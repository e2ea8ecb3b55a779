"""Links of the network laboratory beside their settings: rates, round trips, and the relay's limit.

python -m bench.studies.lab      # needs root, `ip` and `tc`; about two minutes
"""

from __future__ import annotations

import argparse
import statistics

from tests.network.lab import Lab, why_not
from tests.network.probes import round_trips_s, transfer, transfers

PAYLOAD_SHARE = 1448 / 1514
RATES_BYTES_PER_S = (1.25e6, 12.5e6, 25e6, 50e6, 125e6)
SECONDS = 4.0


def milliseconds(trips_s: list[float]) -> str:
    """Return the median and the 99th percentile."""
    return f"{statistics.median(trips_s) * 1e3:.2f} ms, 99 %: {statistics.quantiles(trips_s, n=100)[-1] * 1e3:.2f} ms"


def main() -> None:
    """Measure with and without the relay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays-s", type=float, nargs="+", default=[0.0, 0.001, 0.02])
    arguments = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    for delay_s in arguments.delays_s:
        print(f"one-way delay {delay_s * 1e3:g} ms{'' if delay_s else ' (no relay)'}", flush=True)
        with Lab(4, delay_s=delay_s) as lab:
            print(f"  round trip, idle: {milliseconds(round_trips_s(lab[0], lab[1], 200))}", flush=True)
            for rate in RATES_BYTES_PER_S:
                for node in lab:
                    node.shape(rate)
                num_bytes = round(rate * SECONDS)
                one = transfer(lab[0], lab[1], num_bytes) / (rate * PAYLOAD_SHARE)
                ring = transfers([(lab[i], lab[(i + 1) % 4]) for i in range(4)], num_bytes // 2)
                around = " ".join(f"{share / (rate * PAYLOAD_SHARE):.2f}" for share in ring)
                print(
                    f"  {rate * 8e-6:>6g} Mbit/s: one transfer {one:.2f} of the rate; four around: {around}", flush=True
                )


if __name__ == "__main__":
    main()
