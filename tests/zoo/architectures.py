"""Tiny architectures of transformers with random weights: nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

Inputs = dict[str, Tensor]
Build = Callable[[], tuple[nn.Module, Inputs]]

VOCABULARY = 128
_BATCH, _LENGTH = 8, 32
# In some architecture, token ids below this are special: padding, begin, end, mask, classification.
_SPECIAL = 5

# One block says as much as two, in half the time. Not so where blocks alternate or pass something
# on to the next one.
_TWO_BLOCKS = {"num_hidden_layers": 2}

# Configurations translate most of these names to their own. They ignore settings that their
# architecture does not have.
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "use_cache": False,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "use_cache": False,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
_AUDIO: dict[str, Any] = {
    **_TEXT,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 5),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
    "ctc_zero_infinity": True,
}
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LATENT = {
    **_EXPERTS,
    **_TWO_BLOCKS,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_WINDOW = {**_GROUPED, **_TWO_BLOCKS, "head_dim": 16, "sliding_window": 16}
_STATE_SPACE = {"state_size": 8, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}

# Models that compute the loss of the next token.
_DECODERS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, **_TWO_BLOCKS},
    "gpt2": _TWO_BLOCKS,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "qwen2_moe": {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "head_dim": 16},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "gpt_oss": {**_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "gemma": {**_GROUPED, "head_dim": 16},
    "gemma2": _WINDOW,
    "gemma3_text": _WINDOW,
    "phi": {},
    "phi3": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 16},
    "falcon": {},
    "bloom": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neo": {**_TWO_BLOCKS, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "gpt_bigcode": {},
    "codegen": {"rotary_dim": 8},
    "mpt": {"max_seq_len": 64},
    "olmo": {},
    "olmo2": {},
    "olmoe": {**_EXPERTS, "num_experts": 4},
    "granite": _GROUPED,
    "granitemoe": {**_EXPERTS, "num_local_experts": 4},
    "cohere": _GROUPED,
    "cohere2": _WINDOW,
    "starcoder2": _GROUPED,
    "stablelm": _GROUPED,
    "nemotron": {**_GROUPED, "head_dim": 16},
    "glm": {**_GROUPED, "head_dim": 16},
    "glm4": {**_GROUPED, "head_dim": 16},
    "smollm3": _GROUPED,
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 1, "attention_heads": 4},
    "biogpt": {},
    "persimmon": {},
    "exaone4": _WINDOW,
    "ernie4_5": {**_GROUPED, "head_dim": 16},
    "diffllama": _GROUPED,
    "jetmoe": {**_GROUPED, "kv_channels": 16, "num_local_experts": 4},
    "bitnet": _GROUPED,
    "mamba": _STATE_SPACE,
    "falcon_mamba": _STATE_SPACE,
    "mamba2": {
        "state_size": 8,
        "expand": 2,
        "head_dim": 16,
        "num_heads": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "rwkv": {**_TWO_BLOCKS, "attention_hidden_size": 64, "context_length": 64},
    "recurrent_gemma": {
        **_TWO_BLOCKS,
        **_GROUPED,
        "lru_width": 64,
        "attention_window_size": 16,
        "block_types": ("recurrent", "attention"),
    },
    "jamba": {
        **_TWO_BLOCKS,
        **_GROUPED,
        "num_experts": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "bamba": {
        **_TWO_BLOCKS,
        **_GROUPED,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "lfm2": {**_TWO_BLOCKS, **_GROUPED, "full_attn_idxs": [1], "block_ff_dim": 96},
    "qwen3_next": {
        **_TWO_BLOCKS,
        **_EXPERTS,
        "num_experts": 4,
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "zamba2": {
        **_TWO_BLOCKS,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "num_key_value_heads": 4,
        "use_mem_eff_path": False,
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "adapter_rank": 8,
    },
    "helium": {**_GROUPED, "head_dim": 16},
    "modernbert-decoder": {**_TWO_BLOCKS, "local_attention": 16},
}

# These loop over tokens in Python, so the graph grows with their number.
_RECURRENT = ("mamba", "falcon_mamba", "rwkv", "jamba", "recurrent_gemma")
_FEW_TOKENS = 8

# Models that compute the loss of masked tokens.
_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _TWO_BLOCKS,
    "roberta": {"max_position_embeddings": 66},
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 1, "n_heads": 4},
    "albert": {**_TWO_BLOCKS, "embedding_size": 32, "num_hidden_groups": 1},
    "electra": {"embedding_size": 32},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 16,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    "xlm-roberta": {"max_position_embeddings": 66},
    "mpnet": {"max_position_embeddings": 66},
    "roformer": {"embedding_size": 64},
    "funnel": {
        "num_hidden_layers": None,
        "initializer_std": 0.02,
        "d_model": 64,
        "n_head": 4,
        "d_head": 16,
        "d_inner": 96,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
    },
    "longformer": {"attention_window": 16, "max_position_embeddings": 66},
    "big_bird": {"attention_type": "original_full"},
    "convbert": {"embedding_size": 32, "conv_kernel_size": 3},
    "squeezebert": {"embedding_size": 64},
    "mobilebert": {
        "embedding_size": 32,
        "intra_bottleneck_size": 32,
        "true_hidden_size": 32,
        "num_feedforward_networks": 2,
    },
    "modernbert": {**_TWO_BLOCKS, "local_attention": 16, "global_attn_every_n_layers": 2},
    # with fewer landmarks, its mask has no shape that a traced graph can add
    "nystromformer": {"segment_means_seq_len": 32, "num_landmarks": 32},
    "fnet": {"use_tpu_fourier_optimizations": False},
    "esm": {"max_position_embeddings": 66, "mask_token_id": 3},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "ibert": {"max_position_embeddings": 66},
    "megatron-bert": {},
    "camembert": {"max_position_embeddings": 66},
}

_SEQUENCE_TO_SEQUENCE: dict[str, dict[str, Any]] = {
    "t5": {"d_kv": 16, "d_ff": 96, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4},
    "mt5": {"d_kv": 16, "d_ff": 96, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4},
    "umt5": {"d_kv": 16, "d_ff": 96, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4},
    "bart": {},
    "mbart": {},
    "pegasus": {},
    "marian": {},
    "blenderbot": {},
    "m2m_100": {},
    "switch_transformers": {
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 1,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
}

_STAGES = {
    "embed_dim": 32,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "patch_size": 4,
    "num_labels": 10,
    "image_size": 32,
}
_CONVOLUTIONAL = {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "num_labels": 10}
_IMAGE_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "vit": {**_VISION, **_TWO_BLOCKS},
    "beit": {**_VISION, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    "dinov2": {**_VISION, "mlp_ratio": 2},
    "dinov2_with_registers": {**_VISION, "mlp_ratio": 2},
    "ijepa": _VISION,
    "vit_msn": _VISION,
    "swin": _STAGES,
    "swinv2": _STAGES,
    "convnext": _CONVOLUTIONAL,
    "convnextv2": _CONVOLUTIONAL,
    "resnet": {**_CONVOLUTIONAL, "embedding_size": 32, "layer_type": "basic"},
    "poolformer": {
        "hidden_sizes": [32, 64],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
        "num_labels": 10,
    },
    "segformer": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [32, 64],
        "decoder_hidden_size": 32,
        "num_attention_heads": [2, 4],
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
        "num_labels": 10,
    },
    "pvt": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [32, 64],
        "num_attention_heads": [2, 4],
        "sequence_reduction_ratios": [2, 1],
        "patch_sizes": [4, 2],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
        "image_size": 32,
        "num_labels": 10,
    },
    # Smaller images end in one position. There a gradient through batch norm is noise beside what
    # cancels.
    "mobilevit": {
        "image_size": 64,
        "patch_size": 2,
        "hidden_sizes": [32, 48, 64],
        "neck_hidden_sizes": [8, 16, 16, 24, 32, 48, 64],
        "num_labels": 10,
    },
}


def _config(model_type: str, settings: dict[str, Any]) -> Any:
    """A configuration without dropout, skipped layers, or auxiliary losses that draw numbers."""
    given = {name: value for name, value in settings.items() if value is not None}
    config = AutoConfig.for_model(model_type, **given)
    _without_dropout(config)
    return config


def _without_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _without_dropout(value)
        elif ("drop" in name or name in ("router_jitter_noise", "input_jitter_noise")) and (
            isinstance(value, float) and not isinstance(value, bool)
        ):
            setattr(config, name, 0.0)


def _model(head: str, model_type: str, settings: dict[str, Any], **options: Any) -> nn.Module:
    """A model in training mode with random weights, always the same ones."""
    torch.manual_seed(0)
    config = _config(model_type, settings)
    model: nn.Module = getattr(transformers, head).from_config(config, **options)
    _unsettle(model)
    return model.train()


def _unsettle(model: nn.Module) -> None:
    """Move parameters that start as constants to where training would take them.

    Such are zero biases and gates.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _tokens(length: int = _LENGTH) -> Tensor:
    return torch.randint(_SPECIAL, VOCABULARY, (_BATCH, length), generator=_random())


def _with_labels(tokens: Tensor) -> Inputs:
    return {"input_ids": tokens, "labels": tokens.clone()}


def _images(size: int = 32) -> Tensor:
    return torch.randn(_BATCH, 3, size, size, generator=_random())


def _decoder(model_type: str, **options: Any) -> tuple[nn.Module, Inputs]:
    settings = {**_TEXT, **_DECODERS[model_type]}
    model = _model("AutoModelForCausalLM", model_type, settings, **options)
    return model, _with_labels(_tokens(_FEW_TOKENS if model_type in _RECURRENT else _LENGTH))


def _encoder(model_type: str, **options: Any) -> tuple[nn.Module, Inputs]:
    settings = {**_TEXT, **_ENCODERS[model_type]}
    model = _model("AutoModelForMaskedLM", model_type, settings, **options)
    tokens = _tokens()
    inputs = {"input_ids": tokens, "labels": tokens.clone()}
    inputs["labels"][:, ::3] = -100
    if model_type not in ("fnet", "nystromformer"):
        inputs["attention_mask"] = _mask()
    return model, inputs


def _mask() -> Tensor:
    """The second sequence is a few tokens shorter."""
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.int64)
    mask[1, -5:] = 0
    return mask


def _sequence_to_sequence(model_type: str, **options: Any) -> tuple[nn.Module, Inputs]:
    settings = {**_ENCODER_DECODER, **_SEQUENCE_TO_SEQUENCE[model_type]}
    model = _model("AutoModelForSeq2SeqLM", model_type, settings, **options)
    return model, _with_labels(_tokens())


def _image_classifier(model_type: str, **options: Any) -> tuple[nn.Module, Inputs]:
    settings = _IMAGE_CLASSIFIERS[model_type]
    model = _model("AutoModelForImageClassification", model_type, settings, **options)
    images = _images(settings.get("image_size", 32))
    return model, {"pixel_values": images, "labels": torch.arange(_BATCH)}


def _without_loss(head: str, model_type: str, settings: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    return _model(head, model_type, settings), {"input_ids": _tokens()}


def _classifier(model_type: str, **options: Any) -> tuple[nn.Module, Inputs]:
    settings = {**_TEXT, **_ENCODERS[model_type], "num_labels": 3}
    model = _model("AutoModelForSequenceClassification", model_type, settings, **options)
    inputs = {"input_ids": _tokens(), "attention_mask": _mask(), "labels": torch.arange(_BATCH) % 3}
    return model, inputs


def _canine() -> tuple[nn.Module, Inputs]:
    settings = {
        **_TEXT,
        "num_hash_functions": 2,
        "num_hash_buckets": 64,
        "local_transformer_stride": 16,
        "downsampling_rate": 4,
        "upsampling_kernel_size": 4,
        "num_labels": 3,
    }
    model = _model("AutoModelForSequenceClassification", "canine", settings)
    return model, {"input_ids": _tokens(64), "labels": torch.arange(_BATCH) % 3}


def _contrastive(model_type: str, **options: Any) -> tuple[nn.Module, Inputs]:
    settings = {"text_config": dict(_TEXT), "vision_config": dict(_VISION), "projection_dim": 32}
    model = _model("AutoModel", model_type, settings, **options)
    loss = {} if model_type == "siglip" else {"return_loss": True}
    return model, {"input_ids": _tokens(), "pixel_values": _images(), **loss}


def _vision_tower(model_type: str) -> tuple[nn.Module, Inputs]:
    return _model("AutoModel", model_type, _VISION), {"pixel_values": _images()}


def _audio(model_type: str, **options: Any) -> tuple[nn.Module, Inputs]:
    model = _model("AutoModelForCTC", model_type, {**_AUDIO, "vocab_size": 32}, **options)
    sound = torch.randn(_BATCH, 640, generator=_random())
    labels = torch.randint(_SPECIAL, 32, (_BATCH, 6), generator=_random())
    return model, {"input_values": sound, "labels": labels}


def _whisper(**options: Any) -> tuple[nn.Module, Inputs]:
    settings = {
        **_ENCODER_DECODER,
        "num_mel_bins": 16,
        "max_source_positions": 32,
        "max_target_positions": 64,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    model = _model("AutoModelForSpeechSeq2Seq", "whisper", settings, **options)
    sound = torch.randn(_BATCH, 16, 64, generator=_random())
    return model, {"input_features": sound, "labels": _tokens()}


def _spectrogram() -> tuple[nn.Module, Inputs]:
    settings = {
        **_VISION,
        "num_mel_bins": 16,
        "max_length": 32,
        "frequency_stride": 8,
        "time_stride": 8,
    }
    model = _model("AutoModelForAudioClassification", "audio-spectrogram-transformer", settings)
    sound = torch.randn(_BATCH, 32, 16, generator=_random())
    return model, {"input_values": sound, "labels": torch.arange(_BATCH)}


def _layoutlm() -> tuple[nn.Module, Inputs]:
    settings = {**_TEXT, "max_2d_position_embeddings": 64, "num_labels": 5}
    model = _model("AutoModelForTokenClassification", "layoutlm", settings)
    tokens = _tokens()
    corners = torch.randint(0, 32, (_BATCH, _LENGTH, 2), generator=_random())
    boxes = torch.cat([corners, corners + 8], -1)
    return model, {"input_ids": tokens, "bbox": boxes, "labels": tokens % 5}


def _vilt() -> tuple[nn.Module, Inputs]:
    settings = {**_TEXT, **_VISION, "modality_type_vocab_size": 2, "max_image_length": -1}
    model = _model("AutoModelForVisualQuestionAnswering", "vilt", settings)
    answers = torch.rand(_BATCH, 10, generator=_random())
    return model, {"input_ids": _tokens(), "pixel_values": _images(), "labels": answers}


def _perceiver() -> tuple[nn.Module, Inputs]:
    settings = {
        **_TEXT,
        "num_latents": 16,
        "d_latents": 64,
        "d_model": 64,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "qk_channels": 64,
        "v_channels": 64,
    }
    model = _model("AutoModelForMaskedLM", "perceiver", settings)
    return model, _with_labels(_tokens(64))


def _llava() -> tuple[nn.Module, Inputs]:
    settings = {
        "text_config": {"model_type": "llama", **_TEXT, **_GROUPED},
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
        "image_token_id": 3,
        "vision_feature_layer": -1,
    }
    model = _model("AutoModelForImageTextToText", "llava", settings)
    tokens = _tokens()
    tokens[:, 2:18] = 3  # an image has 4 x 4 patches
    return model, {**_with_labels(tokens), "pixel_values": _images()}


def _blip() -> tuple[nn.Module, Inputs]:
    text = {**_TEXT, "encoder_hidden_size": 64, "projection_dim": 32, "sep_token_id": 2}
    settings = {"text_config": text, "vision_config": dict(_VISION), "projection_dim": 32}
    model = _model("AutoModelForImageTextToText", "blip", settings)
    return model, {**_with_labels(_tokens()), "pixel_values": _images()}


def _mae() -> tuple[nn.Module, Inputs]:
    settings = {
        **_VISION,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
    }
    model = _model("AutoModelForPreTraining", "vit_mae", settings)
    noise = torch.rand(_BATCH, 16, generator=_random())
    return model, {"pixel_values": _images(), "noise": noise}


def _videomae() -> tuple[nn.Module, Inputs]:
    settings = {**_VISION, "num_frames": 4, "tubelet_size": 2}
    model = _model("AutoModelForVideoClassification", "videomae", settings)
    video = torch.randn(_BATCH, 4, 3, 32, 32, generator=_random())
    return model, {"pixel_values": video, "labels": torch.arange(_BATCH)}


def _segmentation() -> tuple[nn.Module, Inputs]:
    model = _model("AutoModelForSemanticSegmentation", "segformer", _IMAGE_CLASSIFIERS["segformer"])
    labels = torch.randint(0, 10, (_BATCH, 32, 32), generator=_random())
    return model, {"pixel_values": _images(), "labels": labels}


def _time_series() -> tuple[nn.Module, Inputs]:
    settings = {
        "num_input_channels": 4,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "prediction_length": 8,
        "d_model": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 96,
    }
    torch.manual_seed(0)
    model = transformers.PatchTSTForPrediction(_config("patchtst", settings)).train()
    _unsettle(model)
    past = torch.randn(8, 32, 4, generator=_random())
    return model, {"past_values": past, "future_values": past[:, :8] * 0.5}


# Attention written out: matmul, mask, softmax, matmul.
_ALSO_EAGER = {
    _decoder: ("llama", "gpt2", "gemma2", "mistral", "falcon", "opt", "phi3", "bloom", "qwen3"),
    _encoder: ("bert", "roberta", "modernbert"),
    _sequence_to_sequence: ("bart",),
    _image_classifier: ("vit",),
    _contrastive: ("clip",),
    _audio: ("wav2vec2",),
}


def _all() -> dict[str, Build]:
    builds: dict[str, Build] = {}

    def add(build: Callable[..., tuple[nn.Module, Inputs]], *names: str) -> None:
        builds.update({name: functools.partial(build, name) for name in names})

    add(_decoder, *_DECODERS)
    add(_encoder, *_ENCODERS)
    add(_sequence_to_sequence, *_SEQUENCE_TO_SEQUENCE)
    add(_image_classifier, *_IMAGE_CLASSIFIERS)
    add(_contrastive, "clip", "siglip")
    add(
        _audio,
        "wav2vec2",
        "hubert",
        "wavlm",
        "unispeech-sat",
        "wav2vec2-conformer",
        "data2vec-audio",
    )
    add(_vision_tower, "clip_vision_model", "siglip_vision_model")
    builds |= {
        "canine": _canine,
        "whisper": _whisper,
        "audio_spectrogram_transformer": _spectrogram,
        "layoutlm": _layoutlm,
        "vilt": _vilt,
        "perceiver": _perceiver,
        "llava": _llava,
        "blip": _blip,
        "vit_mae": _mae,
        "videomae": _videomae,
        "segformer:segmentation": _segmentation,
        "patchtst": _time_series,
    }
    for name in ("roberta", "deberta-v2", "distilbert"):
        builds[f"{name}:classifier"] = functools.partial(_classifier, name)
    for name in ("llama", "gpt2", "gemma2", "mamba2"):  # the caller computes the loss
        builds[f"{name}:logits"] = functools.partial(
            _without_loss, "AutoModelForCausalLM", name, {**_TEXT, **_DECODERS[name]}
        )
    for name in ("bert", "modernbert", "clip_text_model"):
        builds[f"{name}:hidden"] = functools.partial(
            _without_loss, "AutoModel", name, {**_TEXT, **_ENCODERS.get(name, {})}
        )
    for build, names in _ALSO_EAGER.items():
        for name in names:
            builds[f"{name}:eager"] = functools.partial(build, name, attn_implementation="eager")
    return builds


ARCHITECTURES: dict[str, Build] = _all()
