"""Pages that are one file: style, script and data inlined, nothing read from a network."""

import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

PAGE = resources.files("moesaic.analysis") / "page"


def fill(template: str, parts: Mapping[str, str]) -> str:
    """A template of page/ with its {{names}} replaced. In one pass, so that text which looks like a name stays text."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read(template))


def read(*names: str) -> str:
    """Files of page/, one after another."""
    return "\n".join((PAGE / name).read_text(encoding="utf-8") for name in names)


def script_safe(payload: Mapping[str, Any]) -> str:
    """JSON that no HTML parser can leave: `</script>` and `<!--` cannot occur in it."""
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
