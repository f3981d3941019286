"""Prints the 20 slowest tests of pytest's reports: python .ci/slowest.py REPORT.xml ..."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

SHOWN = 20

tests = [
    (float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}")
    for report in sys.argv[1:]
    if Path(report).is_file()
    for case in ElementTree.parse(report).iter("testcase")
]
print(f"\n== the {SHOWN} slowest of {len(tests)} tests")
for seconds, name in sorted(tests, reverse=True)[:SHOWN]:
    print(f"{seconds:8.1f} {name}")
