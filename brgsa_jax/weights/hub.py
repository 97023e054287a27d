"""Folders of models, here or on the Hugging Face hub."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brgsa_jax.config import UserError

# End of a message.
GIVE_CONFIG = "give the config.json that belongs to the weights"
# Where the tensors of a Hugging Face folder may lie, the first found is taken.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")
# What is fetched of a model of the hub, never code; of the second only what has no safetensors.
PATTERNS = ("*.json", "*.safetensors", "vocab.txt")
PYTORCH_PATTERNS = ("*.json", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt",
                   "special_tokens_map.json")


def locate(folder_or_hub_id: str | Path, wanted: str,
           patterns: Sequence[str] = PATTERNS) -> Path:
    """Returns a folder that is here, or a snapshot of a model of the hub.

    Args:
        folder_or_hub_id: a folder, or "owner/name".
        wanted: for messages, what a folder should be.
        patterns: files to fetch.

    Raises:
        UserError: neither a folder nor an id, or the hub gives nothing.
    """
    folder, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if name and os.path.isdir(folder):
        return folder
    if os.path.exists(folder) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"there is no model at {name}; give {wanted}, or a hub id owner/name")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is no folder here, and the hub gave no model of that name "
                        f"({reason}); check the path, or the network") from error


def locate_weights(folder_or_hub_id: str | Path, wanted: str) -> tuple[Path, Path]:
    """Returns a Hugging Face folder and the file with its tensors; a file stands for itself.

    Of a model of the hub, PyTorch files are fetched only where there is no safetensors file.

    Raises:
        UserError: as `locate`, or no file with weights.
    """
    if os.path.isfile(folder_or_hub_id):
        return Path(folder_or_hub_id).parent, Path(folder_or_hub_id)
    for patterns in (PATTERNS, PYTORCH_PATTERNS):
        folder = locate(folder_or_hub_id, wanted, patterns)
        for name in WEIGHT_FILES:
            if (folder / name).is_file():
                return folder, folder / name
    raise UserError(f"{folder} holds no weights; it needs one of {', '.join(WEIGHT_FILES)}")


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: the file.
        mend: end of the message, such as `GIVE_CONFIG`.

    Raises:
        UserError: missing, unreadable, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read ({reason}); {mend}") from error
    return content


def check_config(path: Path, config: Mapping[str, Any], kinds: Sequence[str],
                 always: Mapping[str, Any]) -> None:
    """Checks a config.json of Hugging Face.

    Args:
        path: of the config.json.
        config: its content.
        kinds: values of "model_type" that can be read.
        always: what the encoder here does; a key left out says the same.

    Raises:
        UserError: another type of model, or one that does otherwise.
    """
    # The first configurations did not name their type.
    kind = config.get("model_type", kinds[0])
    if kind not in kinds:
        raise UserError(f"{path} describes a model of the type {kind!r}, which would be computed "
                        f"wrongly here; give one of the type {' or '.join(kinds)}")
    wrong = [f"{key}={config[key]!r}" for key, value in always.items()
             if config.get(key, value) != value]
    if wrong:
        known = ", ".join(f"{key}={value!r}" for key, value in always.items())
        raise UserError(f"{path} describes a model with {', '.join(wrong)}, which would be "
                        f"computed wrongly here; give one with {known}")


def check_sizes(path: Path, config: Mapping[str, Any], sizes: Mapping[str, Any],
                width: int) -> dict[str, Any]:
    """Checks a config.json against the tensors it lies beside.

    Args:
        path: of the config.json.
        config: its content.
        sizes: what the tensors say, by the keys of the configuration.
        width: of the encoder.

    Returns:
        What no tensor tells: "heads" and "norm_epsilon".

    Raises:
        UserError: every difference.
    """
    wrong = [f"{key}={config[key]} and the tensors say {size}" for key, size in sizes.items()
             if config.get(key, size) != size]
    heads, epsilon = config.get("num_attention_heads"), config.get("layer_norm_eps", 1e-12)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        wrong.append(f"num_attention_heads={heads!r} does not divide the width {width}")
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
        wrong.append(f"layer_norm_eps={epsilon!r} is no small number")
    if wrong:
        raise UserError(f"{path} does not belong to the weights beside it: {'; '.join(wrong)}; "
                        f"{GIVE_CONFIG}")
    return {"heads": heads, "norm_epsilon": float(epsilon)}
