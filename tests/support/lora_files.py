"""Files of other libraries: outputs that agree, models to write and read them, and files that are refused."""

import warnings

import pytest
import torch
from models import make

import medpeft

PEFT_WARNINGS = [
    # peft asks transformers 5 so.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def close(a, b):
    return bool((a - b).abs().max() <= 1e-9 * b.abs().max())


def unet():
    return make("diffusion_unet").unet


def denoised(unet, x):
    return unet(x, torch.tensor(7), x.flatten(2)[:, :2, :6]).sample


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 20, "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": 1}
    return CLIPTextModel(CLIPTextConfig(**sizes, **tokens)).double().eval()


def refused(call, model, path, reason, **options):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(medpeft.CheckpointError) as caught:
        call(model, path, **options)
    assert reason in str(caught.value)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def trained_by_peft(base, folder, config="LoraConfig", **options):
    """A model of peft's, its factors drawn anew, and its files."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = peft.get_peft_model(base, getattr(peft, config)(**options))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        model.save_pretrained(folder)
    return model.eval()
