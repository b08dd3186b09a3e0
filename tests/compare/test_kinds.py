"""Every kind of model: encoder-decoders of text, models of images from a folder, models of sound from wav files."""

from __future__ import annotations

import copy
import json
import re
import wave

import pytest
import torch
import transformers
from hal_cli import main
from hal_compare import lanes, measure, media, models, tables, tasks, texts
from hal_compare.metrics import read_outputs
from hal_compare.report.page import render

from hal_core import HalError

Image = pytest.importorskip("PIL.Image")

T5 = transformers.T5Config(
    vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
)
VIT = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)
WHISPER = transformers.WhisperConfig(
    vocab_size=32,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    num_mel_bins=80,
    max_source_positions=50,
    max_target_positions=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
    decoder_start_token_id=2,
    suppress_tokens=[],
    begin_suppress_tokens=[],
)
WAV2VEC2 = transformers.Wav2Vec2Config(
    vocab_size=32,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=(16, 16),
    conv_stride=(5, 4),
    conv_kernel=(10, 8),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)


@pytest.fixture
def folder(tmp_path, seed, save_tokenizer):
    """A model's folder: class, config, and a processor or a tokenizer."""

    def make(kind, config, processor=None):
        path = tmp_path / kind.__name__
        torch.manual_seed(seed)
        kind(copy.deepcopy(config)).eval().save_pretrained(path)
        save_tokenizer(path) if processor is None else processor.save_pretrained(path)
        return path

    return make


@pytest.fixture
def images(tmp_path, seed):
    path = tmp_path / "images"
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for number in range(5):
        pixels = torch.randint(0, 255, (40 + number, 50, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(path / f"{number}.png")
    return path


@pytest.fixture
def sounds(tmp_path, seed):
    """Four clips of two lengths at 8,000 samples a second, of two channels and of one, of 8, 16, 24 and 32 bits."""
    path = tmp_path / "sounds"
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for width in (1, 2, 3, 4):
        channels = 2 if width == 2 else 1
        values = torch.randint(-100, 100, (1200 * channels if width < 3 else 900,), generator=generator)
        with wave.open(str(path / f"{width}.wav"), "wb") as sound:
            sound.setparams((channels, width, 8000, 0, "NONE", ""))
            for value in values.tolist():
                raw = value + 128 if width == 1 else value << (8 * (width - 1))
                sound.writeframes(raw.to_bytes(width, "little", signed=width > 1))
    return path


def extractor():
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)


def image_processor():
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32})


def compared(path, files, device=("cpu:0",)):
    model = models.load(str(path), "float32")
    rows = lanes.rows_for(list(device))
    return measure.compare(model, files, rows, repeats=1, batch_size=2, max_length=None, command="")


def right(result):
    """Both rows ran, are near to float64, and attention ran on the device."""
    for row in result.rows:
        assert not row.refusals
        assert 0 < row.accuracy.worst.middle <= 1e-5
        assert row.accuracy.agreement.middle == 1
        assert row.costs.calls > 0
    return result.rows[-1]


def test_an_encoder_decoder_of_text(folder, text):
    path = folder(transformers.T5ForConditionalGeneration, T5)
    result = compared(path, texts.read([text]))
    row = right(result)
    assert result.model["kind"] == "seq2seq"
    assert row.accuracy.decisions == result.tokens, "a next token for each token of the text"
    assert len(row.accuracy.layers) == 6, "embeddings and two layers of the encoder, and of the decoder"
    assert row.accuracy.perplexity.middle == pytest.approx(row.accuracy.reference_perplexity, rel=1e-4)
    assert "positions whose next token" in " ".join(tables.summary(result).notes)


def test_an_encoder_decoder_is_given_the_text_one_position_late(folder, text):
    model = models.load(str(folder(transformers.T5ForConditionalGeneration, T5)), "float32")
    batch = measure.batches_of(model, texts.read([text]), 3, None).batches[-1]
    given = batch.inputs("cpu", torch.float32)
    assert given["decoder_input_ids"][:, 0].tolist() == [0] * len(batch.ids)
    assert torch.equal(given["decoder_input_ids"][:, 1:], given["input_ids"][:, :-1])
    with torch.no_grad():
        outputs = model.network(**given, output_hidden_states=True)
        wanted = model.network(
            input_ids=batch.ids, attention_mask=batch.mask, labels=batch.ids.masked_fill(batch.mask == 0, -100)
        )
    found = read_outputs(outputs, batch, "seq2seq", "mean")
    real = batch.mask.bool()
    first = torch.nn.functional.cross_entropy(outputs.logits[:, 0].double(), batch.ids[:, 0], reduction="sum")
    mean = (found.losses[real[:, 1:]].sum() + first) / real.sum()
    assert float(mean) == pytest.approx(float(wanted.loss), rel=1e-5), "transformers' own loss of the same text"


def test_a_classifier_of_images(folder, images):
    path = folder(transformers.ViTForImageClassification, VIT, image_processor())
    result = compared(path, media.read([images], media.IMAGES, "images"))
    row = right(result)
    assert (result.model["kind"], result.model["modality"]) == ("classifier", "image")
    assert row.accuracy.decisions == 5
    assert row.accuracy.perplexity is None
    assert "5 images; 1 timed run" in tables.headline(result)
    assert tables.task(result) == "same class"


def test_an_encoder_of_images_with_feature_maps(folder, images):
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16],
        num_encoder_blocks=2,
        depths=[1, 1],
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        image_size=32,
    )
    path = folder(transformers.SegformerModel, config, image_processor())
    result = compared(path, media.read([images], media.IMAGES, "images"))
    assert right(result).accuracy.decisions == 5
    assert result.model["kind"] == "embedding"
    assert "images whose nearest neighbour" in " ".join(tables.summary(result).notes)


def test_a_speech_model_that_reads_samples(folder, sounds):
    path = folder(transformers.Wav2Vec2ForCTC, WAV2VEC2, extractor())
    result = compared(path, media.read([sounds], media.SOUNDS, "wav files"))
    row = right(result)
    assert result.model["kind"] == "classifier"
    assert row.accuracy.decisions > 4, "a class for each frame"
    assert "4 clips" in tables.headline(result)
    assert "Error: of the worst clip's hidden states" in " ".join(tables.summary(result).notes)
    page = render(result)
    assert "Mean over clips" in page
    assert "Filled, and the number: worst clip." in page
    assert not re.search(r"\b(worst|mean over|a|over all|by|of up to \d+) texts?\b", page)


def test_a_speech_model_that_writes(folder, sounds):
    processor = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    path = folder(transformers.WhisperForConditionalGeneration, WHISPER, processor)
    result = compared(path, media.read([sounds], media.SOUNDS, "wav files"))
    row = right(result)
    assert (result.model["kind"], row.accuracy.decisions) == ("seq2seq", 4)
    assert len(row.accuracy.layers) == 6


def test_the_error_of_a_noisy_device_shows_in_images(folder, images, device):
    path = folder(transformers.ViTForImageClassification, VIT, image_processor())
    noisy = device("noisy", noise=1e-2)
    result = compared(path, media.read([images], media.IMAGES, "images"), [noisy])
    assert 1e-4 < result.rows[-1].accuracy.worst.middle < 1e-1


def test_wav_files_of_every_width(sounds):
    for width in (1, 2, 3, 4):
        samples, rate = media.read_wav(sounds / f"{width}.wav")
        assert (rate, len(samples)) == (8000, 1200 if width < 3 else 900)
        assert 0.4 < float(samples.abs().max()) <= 100 / 128
        assert samples.dtype == torch.float32


def test_sound_is_resampled_to_the_models_rate(folder, sounds):
    model = models.load(str(folder(transformers.Wav2Vec2ForCTC, WAV2VEC2, extractor())), "float32")
    shapes = {
        tuple(batch.features["input_values"].shape)
        for batch in measure.batches_of(model, media.read([sounds], media.SOUNDS, "wav files"), 2, None).batches
    }
    assert shapes == {(2, 2400), (2, 1800)}


def test_the_command_takes_folders(folder, images, sounds, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    path = folder(transformers.ViTForImageClassification, VIT, image_processor())
    options = ["--devices", "cpu:0", "--repeats", "1"]
    assert (
        main(["compare", str(path), "--images", str(images), *options, "--details", "--report", str(path / "r.html")])
        == 0
    )
    printed = capsys.readouterr().out
    assert "5 images" in printed
    page = (path / "r.html").read_text()
    assert "same class" in page
    for said in (printed, page):
        assert not re.search(r"\b(worst|mean over|a|over all|by|of up to \d+) texts?\b", " ".join(said.split()))
    assert "Error: of the worst image's hidden states" in " ".join(printed.split())
    assert "error of the worst image" in page


def test_what_is_refused(folder, images, sounds, text, capsys):
    vit = folder(transformers.ViTForImageClassification, VIT, image_processor())

    def refused(*arguments):
        assert main(["compare", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "reads image, and no input was given: pass --images FOLDER" in refused(vit)
    assert "reads image, and --text FILE was given: pass --images FOLDER" in refused(vit, "--text", text)
    assert "is not a folder" in refused(vit, "--images", text)
    assert "has no images" in refused(vit, "--images", sounds)
    (images / "9.png").write_bytes(b"no image")
    assert "is not an image that Pillow reads" in refused(vit, "--images", images)
    (vit / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in refused(vit, "--images", images)
    (sounds / "9.wav").write_bytes(b"no sound")
    speech = folder(transformers.Wav2Vec2ForCTC, WAV2VEC2, extractor())
    assert "is not a wav file that can be read" in refused(speech, "--audio", sounds)


def test_a_model_whose_code_computes_attention_itself(folder, text):
    config = transformers.BloomConfig(vocab_size=32, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    path = folder(transformers.BloomForCausalLM, config)
    row = right(compared(path, texts.read([text])))
    assert row.costs.calls == 2 * 6, "two layers, six batches"


def test_a_model_whose_attention_no_mask_says(folder, text):
    config = transformers.LongformerConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        attention_window=[4],
        max_position_embeddings=40,
        pad_token_id=0,
    )
    result = compared(folder(transformers.LongformerModel, config), texts.read([text]))
    assert "LongformerSelfAttention" in " ".join(result.rows[-1].refusals)


def test_a_model_that_needs_two_inputs_is_named(folder, text):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = small | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=small | {"vocab_size": 32}, vision_config=vision)
    path = folder(transformers.CLIPModel, config)
    with pytest.raises(HalError, match="CLIPModel does not run on text alone"):
        compared(path, texts.read([text]))


@pytest.mark.parametrize(
    ("config", "kind", "modality"),
    [
        ({"architectures": ["BertModel"], "model_type": "bert"}, "embedding", "text"),
        ({"architectures": ["BertForSequenceClassification"], "model_type": "bert"}, "embedding", "text"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "causal", "text"),
        ({"architectures": ["BartModel"], "model_type": "bart", "is_encoder_decoder": True}, "seq2seq", "text"),
        (
            {"architectures": ["ASTForAudioClassification"], "model_type": "audio-spectrogram-transformer"},
            "classifier",
            "audio",
        ),
        ({"architectures": ["HubertModel"], "model_type": "hubert"}, "embedding", "audio"),
    ],
)
def test_the_task_is_read_off_the_config(tmp_path, config, kind, modality):
    (tmp_path / "config.json").write_text(json.dumps(config))
    task = tasks.task_of(tmp_path)
    assert (task.kind, task.modality) == (kind, modality)
