"""The linear kernels, one core: GB/s of weights with one token, MAC/cycle with many.

    python benchmarks/kernels.py [--formats Q4_0,Q4_K] [--tiers avx2]

Runs ``kernel_check --bench`` once a round and format; the limits beside each figure are of one thread
and of the tier in use.
"""

from __future__ import annotations

import re
import subprocess

from common import Row, check_program, finish, interleave, parser, start

from pyengine import quant

LINE = re.compile(r"\S+ +(\d+) tokens +([\d.]+) GB/s +[\d.]+ GMAC/s +([\d.]+) MAC/cycle")


def main() -> None:
    p = parser(__doc__, model=False)
    p.add_argument("--formats", default=",".join(quant.FORMATS))
    p.add_argument("--tiers", default=quant.tier_active())
    p.add_argument("--tokens", default="1,4,16,256", help="which of the sizes that kernel_check runs to show")
    p.set_defaults(rounds=1, threads=1)
    args = p.parse_args()
    wanted = [int(n) for n in args.tokens.split(",")]
    report = start(args, "linear kernels, 4096 columns")
    rows: dict[tuple[str, str, int], Row] = {}

    def run(tier: str, name: str) -> None:
        check = check_program("kernel_check")
        command = [check, "--bench", "--tier", tier, "--format", name, "--threads", str(args.threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for line in output.splitlines():
            found = LINE.search(line)
            if not found or int(found[1]) not in wanted:
                continue
            n = int(found[1])
            unit = "GB/s" if n == 1 else "MAC/cycle/core"
            row = rows.setdefault((tier, name, n), Row(f"{tier} {name}, {n} tokens", unit))
            row.values.append(float(found[2] if n == 1 else found[3]))

    pairs = [(tier, name) for tier in args.tiers.split(",") for name in args.formats.split(",")]
    interleave(args.rounds, {" ".join(pair): lambda pair=pair: run(*pair) for pair in pairs})
    for (tier, name, n), row in rows.items():
        report.rows.append(row)
        if n == 1:
            report.of_stream(row, row.median * 1e9, args.threads)
        elif report.limits and tier == quant.tier_active():
            limits = report.limits[args.threads]
            limit = limits.macs(name) / limits.clock_hz / limits.threads
            row.share = f"{100 * row.median / limit:.0f} % of {limit:.0f}" if limit else ""
    finish(report, args)


if __name__ == "__main__":
    main()
