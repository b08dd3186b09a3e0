"""What a model's folder says about its task: which class of transformers loads it, what it reads, what it decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import attrs
import transformers
from transformers.models.auto import modeling_auto

from hal_core import HalError

Kind = Literal["embedding", "causal", "seq2seq", "classifier"]
Modality = Literal["text", "image", "audio"]

_READS: dict[str, Modality] = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_values": "audio",
    "input_features": "audio",
}
_CLASSIFIERS = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForAudioClassification": "AutoModelForAudioClassification",
    "ForSequenceClassification": "AutoModelForAudioClassification",  # the speech models' name of the same
    "ForCTC": "AutoModelForCTC",
}


@attrs.frozen(kw_only=True)
class Task:
    """What a model does.

    Attributes:
        kind: "embedding" (hidden states alone), "causal" (a decoder's next token), "seq2seq" (an encoder-decoder's next
            token) or "classifier" (a class of each item, or of each position). modality: what it reads. auto: the class
            of transformers that loads it. main: the argument that takes what it reads.
    """

    kind: Kind
    modality: Modality
    auto: str
    main: str


def task_of(path: Path) -> Task:
    """The task of the model in a folder.

    Raises:
        HalError: config.json cannot be read, or no model of its type reads text, images or audio alone.
    """
    config = _config(path)
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    model_type = str(config.get("model_type"))
    kind, auto = _kind(architecture, model_type, bool(config.get("is_encoder_decoder")), path)
    found = getattr(transformers, auto)
    model_class = _class_of(found, model_type)
    main = getattr(model_class, "main_input_name", "input_ids")
    if main not in _READS:
        raise HalError(
            f"{path} holds {architecture}, which reads {main}: compare takes models that read {', '.join(_READS)}"
        )
    modality = _READS[main]
    if kind == "classifier" and modality == "text":
        kind, auto = "embedding", "AutoModel"
    return Task(kind=kind, modality=modality, auto=auto, main=main)


def _kind(architecture: str, model_type: str, is_encoder_decoder: bool, path: Path) -> tuple[Kind, str]:
    if architecture.endswith(("ForCausalLM", "LMHeadModel")) and not is_encoder_decoder:
        return "causal", "AutoModelForCausalLM"
    if is_encoder_decoder:
        if model_type in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
            return "seq2seq", "AutoModelForSpeechSeq2Seq"
        if model_type in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            return "seq2seq", "AutoModelForSeq2SeqLM"
        raise HalError(
            f"{path} holds {architecture or model_type}, an encoder-decoder without a head for tokens: compare takes "
            "those of AutoModelForSeq2SeqLM and AutoModelForSpeechSeq2Seq"
        )
    for ending, auto in _CLASSIFIERS.items():
        if architecture.endswith(ending) and _class_of(getattr(transformers, auto), model_type) is not None:
            return "classifier", auto
    return "embedding", "AutoModel"


def _class_of(auto: Any, model_type: str) -> Any:
    """The class that an auto class makes of a model type; None where it knows none."""
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    try:
        found = auto._model_mapping[config[model_type]]
    except (KeyError, ImportError):
        return None
    return found[0] if isinstance(found, tuple | list) else found


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HalError(f"{file} is not JSON ({error}): repair it") from error
    if not isinstance(config, dict):
        raise HalError(f"{file} holds a {type(config).__name__}, not an object: repair it")
    return config
