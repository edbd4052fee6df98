"""The mirror of a report at W&B. The local files are the truth: what is mirrored follows from them, and never changes them.

records.py says what each run holds, mirror.py writes the runs, workspace.py describes the dashboard. docs/tracking.md.
"""

from pathlib import Path

from moepress.artefacts import read_json


def settings_of(tracking: dict) -> dict:
    """The keys of the group `tracking` that a mirror depends on, beside its mode."""
    return {name: tracking[name] for name in ("project", "entity", "upload")}


def drop_stale(note: Path, settings: dict) -> None:
    """Remove the note of a mirror that did not succeed, or was made with other settings, so that it is made again."""
    if note.is_file():
        told = read_json(note)
        if not told.get("complete") or told.get("settings") != settings:
            note.unlink(missing_ok=True)
