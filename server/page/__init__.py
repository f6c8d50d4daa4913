"""GET /: the dashboard and playground, one page without data of its own; it queries the other routes.

Its files are sent as one, so that it is complete wherever it arrives, and its policy names the only scripts that run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

from fastapi import APIRouter, Request, Response

_HERE = Path(__file__).parent


def _part(found: re.Match[str]) -> str:
    """Return the file that {{name}} stands for; texts as HTML."""
    file = _HERE / found[1]
    text = file.read_text(encoding="utf-8")
    return html.escape(text, quote=False) if file.suffix == ".txt" else text


def _page() -> tuple[bytes, str]:
    """Return the page and its Content-Security-Policy: only its own scripts run, and only this server is reached."""
    text = re.sub(r"\{\{([\w.]+)\}\}", _part, (_HERE / "index.html").read_text(encoding="utf-8"))
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for tag, inline in re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL):
        allowed[tag].append(f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'")
    policy = (
        f"default-src 'none'; script-src {' '.join(allowed['script'])}; style-src {' '.join(allowed['style'])}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


_BODY, _POLICY = _page()
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # browsers ask whether their copy is current
    "ETag": f'"{hashlib.sha256(_BODY).hexdigest()[:32]}"',
}
router = APIRouter()


@router.get("/")
async def page(request: Request) -> Response:
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {_HEADERS["ETag"], "*"}:
        return Response(status_code=304, headers=_HEADERS)
    return Response(_BODY, headers=_HEADERS, media_type="text/html; charset=utf-8")
