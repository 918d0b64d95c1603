"""The translations of the nodes' texts in ``locales/``, against the schemas that ComfyUI is told.

After a change to a schema: copy its texts to ``en``, then translate them in ``zh`` and ``ja``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

LANGUAGES = ("en", "ja", "zh")
# The writing that a text in this language must show, and the one that it must not.
HAN, KANA = "[\u4e00-\u9fff]", "[\u3041-\u30ff]"
SCRIPTS = {"ja": (f"{HAN}|{KANA}", r"(?!)"), "zh": (HAN, KANA)}
# Names that are the same in every language, as in ComfyUI's own translations ("Latent" is its Chinese word).
SAME = {"CLIP", "DAVAE", "Latent", "VAE", "cfg", "davae"}
# What vue-i18n, which shows these texts, reads as syntax.
SYNTAX = "[{}@|]"
NUMBER = r"\d+(?:\.\d+)?"

Texts = dict[str, str]


def flat(tree: dict, path: str = "") -> Texts:
    """The texts of a nested dict by dotted path, for example ``DAVAE_Loader.inputs.dtype.tooltip``."""
    found: Texts = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def of_schema(schema) -> dict:
    """What a file in ``locales/`` says of a node, in English."""
    inputs, outputs = schema.inputs or [], schema.outputs or []
    return {
        "description": schema.description,
        "display_name": schema.display_name,
        "inputs": {entry.id: named(entry.display_name or entry.id, entry.tooltip) for entry in inputs},
        "outputs": {str(i): named(entry.display_name, entry.tooltip) for i, entry in enumerate(outputs)},
    }


def named(name: str, tooltip: str | None) -> Texts:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


@pytest.fixture
def english(comfy) -> Texts:
    """The texts of the schemas."""
    nodes = {name: node for name, node in comfy.nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("DAVAE_")}
    return flat({name: of_schema(node.GET_SCHEMA()) for name, node in nodes.items()})


@pytest.fixture
def file(comfy, language: str) -> Path:
    return Path(comfy.base, "custom_nodes", "comfyui-davae", "locales", language, "nodeDefs.json")


@pytest.fixture
def texts(file: Path) -> Texts:
    """The texts of a language."""
    return flat(json.loads(file.read_text(encoding="utf-8")))


def test_there_is_a_file_for_each_language_and_no_other(comfy) -> None:
    folder = Path(comfy.base, "custom_nodes", "comfyui-davae", "locales")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [f"{language}/nodeDefs.json" for language in LANGUAGES]


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_missing_and_nothing_is_stale(english: Texts, texts: Texts, language: str) -> None:
    missing, stale = sorted(english.keys() - texts.keys()), sorted(texts.keys() - english.keys())
    assert not missing and not stale, f"{language}: missing {missing}, stale {stale}"


@pytest.mark.parametrize("language", ["en"])
def test_the_english_texts_are_those_of_the_schemas(english: Texts, texts: Texts, language: str) -> None:
    changed = {path: text for path, text in english.items() if texts.get(path) != text}
    assert not changed, f"translate these anew, too: {json.dumps(changed, indent=2)}"


@pytest.mark.parametrize("language", SCRIPTS)
def test_every_text_is_translated(english: Texts, texts: Texts, language: str) -> None:
    wanted, foreign = SCRIPTS[language]
    for path, text in texts.items():
        name = path.endswith(".name") and text in SAME
        assert name or (re.search(wanted, text) and text != english.get(path)), f"{language}: {path}: {text!r}"
        assert not re.search(foreign, text), f"{language}: {path} is in another language: {text!r}"


@pytest.mark.parametrize("language", SCRIPTS)
def test_a_translation_names_the_numbers_of_the_text(english: Texts, texts: Texts, language: str) -> None:
    for path, text in texts.items():
        given, wanted = set(re.findall(NUMBER, text)), set(re.findall(NUMBER, english.get(path, text)))
        assert given == wanted, f"{language}: {path}: {text!r}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_is_empty_or_is_read_as_syntax(texts: Texts, language: str) -> None:
    for path, text in texts.items():
        assert text.strip() == text != "", f"{language}: {path}"
        assert not re.search(SYNTAX, text), f"{language}: {path}: {text!r}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_file_is_sorted(file: Path, language: str) -> None:
    """One form of writing, so that a change shows as the lines it changes."""
    text = file.read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), ensure_ascii=False, indent=2, sort_keys=True) + "\n"
