"""What tuning adds to the model's folder: the template it was tuned on, and where to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moefy.data.template import ChatTemplate, end_of_turn


def finish_folder(
    folder: Path, config: dict[str, Any], tokenizer: Any, template: ChatTemplate
) -> None:
    """Add to a written model what it was tuned to: the template, and to stop where a turn ends.

    Args:
        folder: of weights and tokenizer.
        config: the source's config.json.
        tokenizer: the model's.
        template: of the conversations.
    """
    if template.source is not None:
        _replace_template(folder, template.source)
    _stop_at(folder, config, end_of_turn(tokenizer, template))


def _replace_template(folder: Path, text: str) -> None:
    """Write the template where runtimes look first, and nowhere else."""
    (folder / "chat_template.jinja").write_text(text)
    (folder / "chat_template.json").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        content = json.loads(settings.read_text())
        if content.pop("chat_template", None) is not None:
            settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _stop_at(folder: Path, config: dict[str, Any], token: int | None) -> None:
    """Make generation stop where the assistant's turn ends, besides where it stopped before."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    known = settings.get("eos_token_id", config.get("eos_token_id"))
    stops = known if isinstance(known, list) else [] if known is None else [known]
    if token is None or token in stops:
        return
    settings["eos_token_id"] = [*stops, token]
    file.write_text(json.dumps(settings, indent=2) + "\n")
