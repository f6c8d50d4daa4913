"""Every query of the dashboard, and every recording rule, returns data: python docker/check_queries.py PROMETHEUS"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

HERE = Path(__file__).parent
PATIENCE_S = 60
QUIET = {"magicdec:requests_aborted:ratio5m"}
"""Queries whose result is empty while nothing is wrong."""


def queries() -> Iterator[str]:
    rules = yaml.safe_load((HERE / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
    for group in rules["groups"]:
        yield from (rule["record"] for rule in group["rules"] if "record" in rule)
    dashboard = json.loads((HERE / "grafana" / "dashboards" / "magicdec.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        yield from (target["expr"].replace("$__rate_interval", "20s") for target in panel["targets"])


def ask(server: str, query: str) -> list[Any]:
    with urlopen(f"{server}/api/v1/query?{urlencode({'query': query})}", timeout=10) as answer:
        found: list[Any] = json.load(answer)["data"]["result"]
    return found


def main() -> int:
    missing = [query for query in queries() if query not in QUIET]
    count = len(missing)
    deadline = time.monotonic() + PATIENCE_S
    while missing and time.monotonic() < deadline:
        missing = [query for query in missing if not ask(sys.argv[1], query)]
        time.sleep(1)
    for query in missing:
        print(f"no data: {query}", file=sys.stderr)
    print(f"{count - len(missing)} of {count} queries have data")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
