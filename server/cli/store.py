"""`magicdec store`: text stores, which are searched for drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Build text stores, which --store searches for drafts.")


@app.callback()
def store() -> None:
    """Build text stores, which --store searches for drafts."""


@app.command()
def build(
    texts: Annotated[list[Path], typer.Argument(help="Text files, in UTF-8.")],
    out: Annotated[Path, typer.Argument(help="The file to create.")],
    model: Annotated[str, typer.Option(help="Model whose tokens it holds: a directory, or `default`.")] = "default",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Index the tokens of texts. A store serves all models with the tokenizer of --model, read-only."""
    from engine.ngram.text_store import build_store, fingerprint
    from models.default import resolve_model
    from models.tokenizer import Tokenizer

    if out.is_dir():
        raise typer.BadParameter(f"{out} is a directory; name a file", param_hint="OUT")
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} exists; replace it with --force", param_hint="OUT")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"{out.parent} is not a directory", param_hint="OUT")
    directory = resolve_model(model)
    tokenizer = Tokenizer(directory)
    encoded = (tokenizer.encode(_read(text), add_special_tokens=False) for text in texts)
    count = build_store(encoded, fingerprint(directory / "tokenizer.json"), out)
    typer.echo(f"{out}: {count:,} tokens")


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{text} is not text in UTF-8: {error.reason}", param_hint="TEXTS") from None
    except OSError as error:
        raise typer.BadParameter(f"{text}: {error.strerror}", param_hint="TEXTS") from None
