"""Entry point of ranks 1 … N - 1 (`python -m engine.processes.start_rank`); standard input is the link to rank 0."""

from __future__ import annotations

from engine.processes.loading_code import without_collecting


def main() -> None:
    """Run as a rank until rank 0 is gone, and end the process."""
    with without_collecting():
        from engine.processes.rank import exit_now
        from engine.processes.rank import main as run
    exit_now(run())


if __name__ == "__main__":
    main()
