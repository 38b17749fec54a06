"""ReZero for the Hugging Face ecosystem: very deep networks without normalisation layers and without warmup.

Where to start:

    a model          ReZeroForCausalLM(ReZeroConfig(num_hidden_layers=64)); load_corpus for bytes to train it on
    stock models     rezero_(model): residual weights in place of the norms of any transformer
    your own blocks  ReZero(module), the residual connection x + resweight * module(x); RZTXEncoderLayer
    train            ReZeroTrainer with ReZeroTrainingArguments, or a loop of your own
    start            gradinit_(model, batches, eta=learning_rate) learns initial scales; metainit_ needs no data
    optimise         RAdam, Ranger, LARS, LAMB, Muon; lookahead(optimizer); param_groups(model, weight_decay)
    prune            hf_rezero.pruning: find_groups, select, prune_; PruningConfig for the Trainer
    grow             grow_(model, num_layers) makes a trained model deeper
    look             hf_rezero.diagnostics: jacobian_spectrum, gradient_profile, resweight_profile
    share            hf_rezero.publish: write_model_card, push_folder

`help(hf_rezero.NAME)` has an example of each. The same from a shell: `hf-rezero --help`.

Example:
    >>> import hf_rezero
    >>> model = hf_rezero.ReZeroForCausalLM(hf_rezero.ReZeroConfig(hidden_size=16, num_attention_heads=2))
    >>> print(model.model.extra_repr())
    12 residual weights from 0 to 0
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)  # 5.17's public name asks for torchvision

from .data import byte_tokenizer, load_corpus
from .diagnostics import jacobian_spectrum
from .initialization import gradinit_, metainit_
from .layers import ReZero, RZTXDecoderLayer, RZTXEncoderLayer
from .models.image_processing_gray import GrayImageProcessorPil
from .models.rezero.configuration_rezero import ReZeroConfig
from .models.rezero.modeling_rezero import (
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroModel,
)
from .models.rezero_mlp.configuration_rezero_mlp import ReZeroMLPConfig
from .models.rezero_mlp.modeling_rezero_mlp import ReZeroMLPForImageClassification, ReZeroMLPModel
from .models.rezero_resnet.configuration_rezero_resnet import ReZeroResNetConfig
from .models.rezero_resnet.modeling_rezero_resnet import ReZeroResNetForImageClassification, ReZeroResNetModel
from .moved import find_moved_modules
from .optim import LAMB, LARS, Muon, RAdam, Ranger, RangerLARS, centralize_gradients, lookahead, param_groups
from .rewrite import fold_resweight_, grow_, layout_, rezero_
from .rewrite.modeling_rewritten import MODEL_TYPE, RewrittenConfig


if TYPE_CHECKING:
    from .trainer import DistillationConfig, GradInitConfig, PruningConfig, ReZeroTrainer, ReZeroTrainingArguments

__version__ = "0.1.0"

# the Trainer of transformers takes as long to import as everything else: it comes with its first use
_WITH_TRAINER = ("DistillationConfig", "GradInitConfig", "PruningConfig", "ReZeroTrainer", "ReZeroTrainingArguments")


def __getattr__(name: str):
    if name not in _WITH_TRAINER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".trainer", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


find_moved_modules()
find_moved_modules()
for config_class in (ReZeroConfig, ReZeroMLPConfig, ReZeroResNetConfig):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    config_class.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, ReZeroModel),
    (AutoModelForCausalLM, ReZeroForCausalLM),
    (AutoModelForMaskedLM, ReZeroForMaskedLM),
    (AutoModelForSequenceClassification, ReZeroForSequenceClassification),
    (AutoModelForTokenClassification, ReZeroForTokenClassification),
    (AutoModel, ReZeroMLPModel),
    (AutoModelForImageClassification, ReZeroMLPForImageClassification),
    (AutoModel, ReZeroResNetModel),
    (AutoModelForImageClassification, ReZeroResNetForImageClassification),
):
    auto_class.register(model_class.config_class, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)
AutoConfig.register(MODEL_TYPE, RewrittenConfig, exist_ok=True)
GrayImageProcessorPil.register_for_auto_class("AutoImageProcessor")
AutoImageProcessor.register(ReZeroMLPConfig, image_processor_classes={"pil": GrayImageProcessorPil}, exist_ok=True)

__all__ = [
    "LAMB",
    "LARS",
    "DistillationConfig",
    "GradInitConfig",
    "Muon",
    "PruningConfig",
    "RAdam",
    "RZTXDecoderLayer",
    "RZTXEncoderLayer",
    "Ranger",
    "RangerLARS",
    "ReZero",
    "ReZeroConfig",
    "ReZeroForCausalLM",
    "ReZeroForMaskedLM",
    "ReZeroForSequenceClassification",
    "ReZeroForTokenClassification",
    "ReZeroMLPConfig",
    "ReZeroMLPForImageClassification",
    "ReZeroMLPModel",
    "ReZeroModel",
    "ReZeroResNetConfig",
    "ReZeroResNetForImageClassification",
    "ReZeroResNetModel",
    "ReZeroTrainer",
    "ReZeroTrainingArguments",
    "byte_tokenizer",
    "centralize_gradients",
    "fold_resweight_",
    "gradinit_",
    "grow_",
    "jacobian_spectrum",
    "layout_",
    "load_corpus",
    "lookahead",
    "metainit_",
    "param_groups",
    "rezero_",
]
