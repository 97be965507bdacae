"""Settings of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from avppc.checks import check_types


@dataclass(frozen=True)
class ReportConfig:
    """One self-contained HTML page about a run."""

    run: Path
    """Directory of a pretraining run, evaluated or not."""
    out: Path | None = None
    """The page, NAME.html; by default report.html in the run's directory."""
    data: Path | None = None
    """Packed shards for the contact sheet; the run's own data by default."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.out is not None and self.out.suffix not in (".html", ".htm"):  # config.json of the run, say
            raise ValueError(f"out must end in .html or .htm, got {self.out}")
