"""Writes dashboards/magicdec.json: python docker/grafana/make_dashboard.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "dashboards" / "magicdec.json"


def quantiles(name: str) -> dict[str, str]:
    rate = f"sum by (le) (rate(magicdec_{name}_bucket[$__rate_interval]))"
    return {f"p{round(100 * q)}": f"histogram_quantile({q}, {rate})" for q in (0.5, 0.95, 0.99)}


PANELS: list[tuple[str, str, dict[str, str]]] = [
    (
        "Tokens per second",
        "short",
        {
            "generated": "sum(rate(magicdec_generated_tokens_total[$__rate_interval]))",
            "prompt": "sum(rate(magicdec_prompt_tokens_total[$__rate_interval]))",
        },
    ),
    (
        "Requests",
        "short",
        {"running": "sum(magicdec_requests_running)", "waiting": "sum(magicdec_requests_waiting)"},
    ),
    (
        "Requests ended, per second",
        "reqps",
        {"{{finished_reason}}": "sum by (finished_reason) (rate(magicdec_requests_finished_total[$__rate_interval]))"},
    ),
    ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
    ("Time per output token", "s", quantiles("time_per_output_token_seconds")),
    ("Time in the queue", "s", quantiles("queue_seconds")),
    (
        "Speed-up over plain decoding",
        "short",
        {"measured": "magicdec:speedup_measured:ratio5m", "predicted": "magicdec:speedup_predicted:ratio5m"},
    ),
    (
        "Acceptance",
        "percentunit",
        {"measured": "magicdec:acceptance:ratio5m", "estimated": "magicdec_acceptance_estimate"},
    ),
    (
        "Drafted tokens per row and round",
        "short",
        {
            "mean": "magicdec:drafted_tokens_per_row:mean5m",
            "p90": "histogram_quantile(0.9, sum by (le) (rate(magicdec_gamma_bucket[$__rate_interval])))",
        },
    ),
    (
        "Drafts accepted, by place",
        "short",
        {"{{position}}": "sum by (position) (rate(magicdec_accepted_tokens_per_position_total[$__rate_interval]))"},
    ),
    (
        "Accepted drafts per second, by origin",
        "short",
        {
            "text": "sum(rate(magicdec_text_accepted_tokens_total[$__rate_interval]))",
            "draft model": "sum(rate(magicdec_model_accepted_tokens_total[$__rate_interval]))",
            "target": "sum(rate(magicdec_accepted_tokens_total[$__rate_interval]))"
            " - sum(rate(magicdec_text_accepted_tokens_total[$__rate_interval]))"
            " - sum(rate(magicdec_model_accepted_tokens_total[$__rate_interval]))",
        },
    ),
    (
        "Where rounds' time goes",
        "s",
        {"{{part}}": "sum by (part) (rate(magicdec_round_seconds_total[$__rate_interval]))"},
    ),
    (
        "KV pool: owned by requests, cached",
        "percentunit",
        {
            "{{instance}} owned": "magicdec_kv_cache_usage_ratio",
            "{{instance}} cached": 'magicdec_pages{state="cached"} / ignoring(state) (magicdec_pages_total > 0)',
        },
    ),
    (
        "Prompt tokens from the prefix cache",
        "percentunit",
        {
            "{{instance}}": "magicdec:prefix_hits:ratio5m",
            "{{instance}} in total": "magicdec_prefix_hits_total / (magicdec_prefix_queries_total > 0)",
        },
    ),
    ("KV bytes read per token", "bytes", {"{{instance}}": "magicdec:kv_bytes_read_per_token:mean5m"}),
    (
        "Preemptions, evictions of cached pages, per second",
        "short",
        {
            "{{instance}} preemptions": "rate(magicdec_preemptions_total[$__rate_interval])",
            "{{instance}} evictions": "rate(magicdec_prefix_evictions_total[$__rate_interval])",
        },
    ),
    (
        "Engine restarts, requests retried",
        "short",
        {"restarts": "sum(magicdec_engine_restarts_total)", "retried": "sum(magicdec_requests_retried_total)"},
    ),
]


def panel(index: int, title: str, unit: str, queries: dict[str, str]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "prometheus"}
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"x": 8 * (index % 3), "y": 8 * (index // 3), "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(65 + i), "datasource": source, "expr": expr, "legendFormat": name}
            for i, (name, expr) in enumerate(queries.items())
        ],
    }


def main() -> None:
    dashboard = {
        "uid": "magicdec",
        "title": "magicdec",
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "panels": [panel(i, *each) for i, each in enumerate(PANELS)],
    }
    FILE.write_text(json.dumps(dashboard, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
