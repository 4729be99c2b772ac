"""Text encoders and heads as ONNX, for onnxruntime: from token ids, or vectors, to the vectors that b3 gives.

    b3 export --model runs/b3 --format onnx --out exported

`exported/model.onnx` takes any number of texts of any length. Of a text encoder its inputs are ``input_ids`` and
``attention_mask`` (B, L) int64, padded on either side; of heads ``vectors`` (B, D) float32 of the frozen encoder. The
output ``sentence_embedding`` (B, D) float32 is pooled, cut to `dim` and L2-normalised. Weights are float32, an adapter
merged.
"""

from __future__ import annotations

import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from b3.console import no_bars
from b3.errors import InputError, RunError
from b3.files import publish, write_text
from b3.model.backbones.heads import Heads
from b3.model.backbones.text_encoder import TextEncoder, first_position
from b3.model.embedder import Embedder, backbone_class, finish, locate

FILE = "model.onnx"
OUTPUT = "sentence_embedding"
ONE_FILE_BYTES = 1 << 30  # larger weights lie beside it: a protobuf holds 2 GiB


class PaddedTexts(nn.Module):
    """A text encoder over padded rows, in operations that ONNX has."""

    inputs = ("input_ids", "attention_mask")
    free = ("items", "tokens")  # their first axes, which may have any length

    def __init__(self, model: TextEncoder) -> None:
        super().__init__()
        self.core, self.settings = model.core, model.settings
        self.core.config._attn_implementation = "eager"

    @property
    def example(self) -> tuple[Tensor, ...]:
        return torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors (B, D) of token ids (B, L); the mask (B, L) is 1 for tokens and 0 for padding."""
        places = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        mask = attention_mask[:, None, None].float()
        hidden = self.core(
            input_ids=input_ids,
            token_type_ids=torch.zeros_like(input_ids),
            position_ids=places + first_position(self.core.config),
            attention_mask=(1 - mask) * torch.finfo(torch.float32).min,
        ).last_hidden_state
        weights = attention_mask[:, :, None].float()
        if self.settings.pooling == "cls":  # 1 at the first token
            weights = weights * (places == 0)[:, :, None]
        return finish((hidden * weights).sum(dim=1) / weights.sum(dim=1), True, self.settings.dim)


class Residual(nn.Module):
    """Heads over vectors that are given, not looked up."""

    inputs = ("vectors",)
    free = ("items",)

    def __init__(self, model: Heads) -> None:
        super().__init__()
        self.network, self.settings, self.width = model.backbone, model.settings, model.width

    @property
    def example(self) -> tuple[Tensor, ...]:
        return (torch.ones(2, self.width),)

    def forward(self, vectors: Tensor) -> Tensor:
        """Vectors (B, D) of vectors (B, D)."""
        return finish(self.network(vectors), True, self.settings.dim)


def export(name: str | Path, adapter: str | Path | None, target: Path, **settings: Any) -> Path:
    """Write the folder `target`: model.onnx, the tokenizer, a card. What it held is replaced. Runs on the CPU.

    Args:
        name, adapter, settings: as for `Embedder.from_pretrained`.

    Raises:
        InputError: the model is neither a text encoder nor heads.
        RunError: onnx or onnxscript is not installed.
    """
    base, _ = locate(name, adapter)
    kind = backbone_class(base)
    if not issubclass(kind, (TextEncoder, Heads)):
        raise InputError(
            f"the model in {base} is {kind.title}; ONNX is written of text encoders and heads alone, leave --format out"
        )
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise RunError("--format onnx needs onnx and onnxscript; install them: pip install 'b3[onnx]'")
    model = Embedder.from_pretrained(name, adapter, dtype="float32", device="cpu", attention="sdpa", **settings)
    staged = target.parent / f".{target.name}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if isinstance(model, TextEncoder):
        model.processor.tokenizer.model_max_length = model.processor.max_length
        model.processor.save_pretrained(staged)
    module = PaddedTexts(model) if isinstance(model, TextEncoder) else Residual(model)  # type: ignore[arg-type]
    _write(module.eval(), staged / FILE)
    write_text(staged / "README.md", card(model, target, name, adapter))
    publish(staged, target)
    return target


def _write(module: PaddedTexts | Residual, file: Path) -> None:
    size = sum(parameter.nbytes for parameter in module.parameters())
    free = [torch.export.Dim(name) for name in module.free]
    dims = {name: dict(enumerate(free)) for name in module.inputs}
    with no_bars(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # both inputs have the same axes, on purpose
        torch.onnx.export(
            module,
            module.example,
            file,
            input_names=list(module.inputs),
            output_names=[OUTPUT],
            dynamic_shapes=dims,
            dynamo=True,
            external_data=size > ONE_FILE_BYTES,
            verbose=False,
        )


TEXTS = """import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
session = onnxruntime.InferenceSession("{folder}/model.onnx")
tokens = tokenizer(["a cat", "a dog"], padding=True, truncation=True, return_tensors="np")
vectors = session.run(None, {{name: tokens[name] for name in ("input_ids", "attention_mask")}})[0]"""
VECTORS = """import onnxruntime

session = onnxruntime.InferenceSession("{folder}/model.onnx")
vectors = session.run(None, {{"vectors": frozen}})[0]  # frozen: (B, {width}) float32 of the encoder"""


def card(model: Embedder, target: Path, name: str | Path, adapter: str | Path | None) -> str:
    """A model card: where the weights come from, how a vector is made, how it is run."""
    code = TEXTS if isinstance(model, TextEncoder) else VECTORS
    return f"""---
library_name: onnx
tags: [onnx, sentence-similarity, b3]
---
# {target.resolve().name}

`{name}`{f" and `{adapter}`" if adapter else ""} as ONNX, in float32. The vector is {model.describe()}.

```python
{code.format(folder=target, width=model.width)}
```
"""
