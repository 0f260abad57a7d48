"""KerasHub's pretrained networks, as `--model=keras_hub:<preset>` names them."""

from typing import Any

from apps import runner

PREFIX = "keras_hub:"


def is_preset(model: str) -> bool:
    """Whether the flag `--model` names a preset."""
    return model.startswith(PREFIX) and model != PREFIX


def load(kind: type, model: str) -> Any:
    """Returns `kind.from_preset`, as of a backbone or a tokenizer.

    Raises:
        AppError: it can't be had.
    """
    try:
        return kind.from_preset(model.removeprefix(PREFIX))
    except Exception as error:  # KerasHub passes on what each of its four download clients raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise runner.AppError(f"--model={model} can't be loaded: {reason}; it needs the web, or a folder") from error
