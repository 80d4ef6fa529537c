"""Injects faults between the machines of a run and looks whether the preflight names them, with the node and the fix;
then runs without a fault, which must find nothing. Needs root and iproute2 (network namespaces).

    python bench/preflight_faults.py [--only PATTERN] [--clean N]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.distributed.nodes import Nodes
from tests.distributed.preflight_cases import CASES, CLEAN
from tests.distributed.preflight_jobs import Result, run_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name matches")
    parser.add_argument("--clean", type=int, default=20, help="runs without a fault")
    parser.add_argument("--show", action="store_true", help="print each case's output")
    given = parser.parse_args()
    chosen = [case for case in CASES if re.search(given.only, case.name)]
    good, alarms, slowest = 0, 0, 0.0
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'fault':44} named  fix   told  ended  codes   (seconds)")
    with Nodes(3) as nodes:
        for case in chosen:
            result = run_case(case, nodes)
            in_time = result.told is not None and result.told <= 30.0
            fine = result.named and result.fixed and in_time and case.code in result.codes
            good += fine
            slowest = max(slowest, result.told or result.seconds)
            print(f"{case.name:44} {_row(result)}{'' if fine else '   ✗'}", flush=True)
            print(f"    {result.line[:200]}", flush=True)
            if given.show or not fine:
                print(result.output, flush=True)
        for number in range(given.clean):
            case = CLEAN[number % len(CLEAN)]
            result = run_case(case, nodes)
            alarm = any(result.codes) or "✗ " in result.output or "! " in result.output
            alarms += alarm
            print(f"clean: {case.name:37} {_row(result)}{'   ✗' if alarm else ''}", flush=True)
            if alarm:
                print(result.output, flush=True)
    share = 100 * good / max(1, len(chosen))
    print(
        f"{good} of {len(chosen)} faults ({share:.0f} %) named with node and fix within 30 s, the slowest in "
        f"{slowest:.0f} s; {alarms} false alarms in {given.clean} clean runs"
    )
    return 0 if share >= 95 and not alarms else 1


def _row(result: Result) -> str:
    named, fixed = ("yes" if found else "no" for found in (result.named, result.fixed))
    told = "-" if result.told is None else f"{result.told:.1f}"
    return f"{named:5}  {fixed:3}  {told:>5}  {result.seconds:5.1f}  {' '.join(map(str, result.codes))}"


if __name__ == "__main__":
    sys.exit(main())
