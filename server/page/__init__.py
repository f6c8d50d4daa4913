"""GET /: the dashboard and playground, one page without data of its own; it queries the other routes."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

from fastapi import APIRouter, Response

_HERE = Path(__file__).parent


def _page() -> tuple[bytes, str]:
    """Return the page and its Content-Security-Policy: only its own script runs, and only this server is reached."""
    sample = html.escape((_HERE / "sample.txt").read_text(encoding="utf-8"), quote=False)
    text = (_HERE / "index.html").read_text(encoding="utf-8").replace("{{SAMPLE}}", sample)
    allowed = {
        tag: "sha256-" + base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        for tag, inline in re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL)
    }
    policy = (
        f"default-src 'none'; script-src '{allowed['script']}'; style-src '{allowed['style']}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


_BODY, _POLICY = _page()
router = APIRouter()


@router.get("/")
async def page() -> Response:
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(_BODY, headers=headers, media_type="text/html; charset=utf-8")
