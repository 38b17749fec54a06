"""Our models as the common tests of transformers see them; `run.py` lays this file beside those tests.

The residual weights start at 0.5: at 0 every layer returns its input, and a test passes whatever the layer does.
"""

import copy
import inspect
import re
import unittest

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.auto import modeling_auto

from hf_rezero import (
    ReZeroConfig,
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroMLPModel,
    ReZeroModel,
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
    ReZeroResNetModel,
    rezero_,
)
from hf_rezero.rewrite.modeling_rewritten import rewritten_class

from . import test_tensor_parallel_mixin
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from .test_tensor_parallel_mixin import TensorParallelTesterMixin
from .test_training_mixin import TrainingTesterMixin


RESWEIGHT = 0.5

# tests that are left out, and why
OF_DECODERS = {
    "test_bc_cache_name_forward": "both names of the cache are accepted, and no warning asks for the newer one",
    "test_generation_tester_mixin_inheritance": "the tests of generation are not in the source archive",
}
OF_IMAGES = {
    "test_hidden_states_output": "hidden states of images have no sequence length",
    "test_model_get_set_embeddings": "image models have no token embeddings",
}
IN_SEGMENTS = "the net checkpoints segments of layers and not each layer"
SKIPPED = {
    "DecoderTest": OF_DECODERS,
    "LearnedPositionsTest": {
        **OF_DECODERS,
        "test_model_rope_scaling_from_config": "learned positions are not scaled",
    },
    "EncoderTest": {},
    "ResNetTest": {**OF_IMAGES},
    "MLPTest": {
        **OF_IMAGES,
        "test_gradient_checkpointing_enable_disable": IN_SEGMENTS,
        "test_training_gradient_checkpointing": IN_SEGMENTS,
        "test_training_gradient_checkpointing_use_reentrant_false": IN_SEGMENTS,
        "test_training_gradient_checkpointing_use_reentrant_true": IN_SEGMENTS,
    },
}
OF_REWRITTEN = {
    "test_can_init_all_missing_weights": "weights of the layers that are missing are refused, never drawn",
    "test_model_weights_reload_no_missing_tied_weights": "weights of the layers that are missing are refused",
}
SKIPPED["RewrittenBertTest"] = OF_REWRITTEN
SKIPPED["RewrittenViTTest"] = {
    **OF_REWRITTEN,
    "test_reverse_loading_mapping": "the names are those of the modules, whatever older releases called them",
    "test_model_get_set_embeddings": OF_IMAGES["test_model_get_set_embeddings"],
    "test_eager_matches_sdpa_inference": "masks patches, for which a model needs a token that the classes here lack",
}
SKIPPED |= {f"Rewritten{name}Test": {**OF_REWRITTEN, **OF_DECODERS} for name in ("Llama", "GPT2")}
if "is_floating_point" not in inspect.getsource(ModelTesterMixin.test_keep_in_fp32_modules):  # as in 5.17
    reason = "asks for half precision of the number of batches that a norm has seen, an integer"
    SKIPPED["ResNetTest"]["test_keep_in_fp32_modules"] = reason

# the tests know by these tables of names which labels a model takes
TASKS = {
    "MODEL_MAPPING_NAMES": (ReZeroModel, ReZeroResNetModel, ReZeroMLPModel),
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": (ReZeroForCausalLM,),
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": (ReZeroForMaskedLM,),
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": (ReZeroForSequenceClassification,),
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": (ReZeroForTokenClassification,),
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": (
        ReZeroResNetForImageClassification,
        ReZeroMLPForImageClassification,
    ),
}
for table, model_classes in TASKS.items():
    for model_class in model_classes:
        getattr(modeling_auto, table)[model_class.config_class.model_type] = model_class.__name__

REWRITTEN = {
    "MODEL_MAPPING_NAMES": (LlamaModel, GPT2Model, BertModel, ViTModel),
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": (LlamaForCausalLM, GPT2LMHeadModel),
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": (BertForMaskedLM,),
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": (
        LlamaForSequenceClassification,
        GPT2ForSequenceClassification,
        BertForSequenceClassification,
    ),
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": (LlamaForTokenClassification, BertForTokenClassification),
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": (ViTForImageClassification,),
}
for table, stock_classes in REWRITTEN.items():
    for stock_class in stock_classes:  # one model type has many classes, which the tests find among the values
        name = rewritten_class(stock_class).__name__
        getattr(modeling_auto, table)[name] = name

# every model: the list that stands here has some of transformers' own
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


def leave_out(tests: type) -> type:
    """Skip what `SKIPPED` names for a class of tests, with all values of its parameters."""
    for name, reason in SKIPPED[tests.__name__].items():
        for test in dir(tests):
            function = getattr(tests, test)  # None where a test stands once for each value
            if function is not None and re.fullmatch(rf"{name}(_\d.*)?", test):
                setattr(tests, test, unittest.skip(reason)(function))
    return tests


class TextModels:
    """Small text configs and inputs; the tests read the sizes by these names."""

    is_training = True
    batch_size, seq_length, vocab_size = 13, 7, 99  # an odd vocabulary, which two ranks do not share evenly
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    common_properties = None

    def __init__(self, causal_lm_class: type | None = None, **options):
        self.causal_lm_class, self.options = causal_lm_class, options

    def get_config(self) -> ReZeroConfig:
        """A new config, which a test may change."""
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: getattr(self, name) for name in names}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3}
        return ReZeroConfig(resweight_init=RESWEIGHT, **sizes, **tokens, **self.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[ReZeroConfig, dict]:
        """A config, and texts of different lengths."""
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class ImageModels:
    """Small configs of one class of image models, and pictures."""

    is_training = True
    batch_size, num_channels, image_size = 4, 3, 16

    def __init__(self, config_class: type, **options):
        self.config_class, self.options = config_class, options
        self.common_properties = list(options)

    def get_config(self) -> ReZeroResNetConfig | ReZeroMLPConfig:
        """A new config, which a test may change."""
        options = copy.deepcopy(self.options)
        return self.config_class(resweight_init=RESWEIGHT, num_channels=self.num_channels, **options)

    def prepare_config_and_inputs_for_common(self) -> tuple[ReZeroResNetConfig | ReZeroMLPConfig, dict]:
        """A config, and pictures."""
        pixels = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixels}


class RewrittenModels:
    """Small configs of a class of transformers whose models went through `rezero_`."""

    is_training = True
    batch_size, seq_length, vocab_size = 13, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    num_channels, image_size, patch_size, num_masks = 3, 8, 4, 2

    def __init__(self, config_class: type, model_class: type):
        self.config_class, self.model_class = config_class, model_class
        self.causal_lm_class = rewritten_class(model_class)
        if config_class is ViTConfig:
            self.seq_length = (self.image_size // self.patch_size) ** 2 + 1

    def get_config(self) -> PreTrainedConfig:
        """A new config, which says what was done to the model."""
        sizes = {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        config = self.config_class(intermediate_size=37, **sizes, **self._inputs())
        model = self.model_class(config)
        rezero_(model, resweight_init=RESWEIGHT)
        model.config._attn_implementation = None  # as in a config of which no model was built
        return model.config

    def _inputs(self) -> dict:
        if self.config_class is ViTConfig:
            return {"image_size": self.image_size, "patch_size": self.patch_size}
        return {"vocab_size": self.vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict]:
        """A config, and texts of different lengths or pictures."""
        if self.config_class is ViTConfig:
            pixels = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
            return self.get_config(), {"pixel_values": pixels}
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class CommonTests(ModelTesterMixin):
    """The tests of every model, with those of its config."""

    test_can_init_all_missing_weights_before_2023 = True  # also of files without a year in a line of copyright

    def test_config(self):
        models, config = self.model_tester, self.model_tester.get_config()
        options = {"has_text_modality": hasattr(config, "vocab_size"), "common_properties": models.common_properties}
        ConfigTester(self, type(config), **options, **models.options).run_common_tests()


class DecoderTests(CommonTests, TrainingTesterMixin, TensorParallelTesterMixin):
    """The tests of decoders: each learns a batch by heart, and computes on two ranks what it computes on one."""

    all_model_classes = (
        ReZeroModel,
        ReZeroForCausalLM,
        ReZeroForSequenceClassification,
        ReZeroForTokenClassification,
    )


class ImageTests(CommonTests):
    """The tests of models without attention and without tokens."""

    has_attentions = test_resize_embeddings = False


@leave_out
class DecoderTest(DecoderTests, unittest.TestCase):
    model_tester = TextModels(ReZeroForCausalLM, num_key_value_heads=2)


@leave_out
class LearnedPositionsTest(DecoderTests, unittest.TestCase):
    model_tester = TextModels(
        ReZeroForCausalLM, position_embedding_type="learned", tie_word_embeddings=True, norm_position="pre"
    )


@leave_out
class EncoderTest(CommonTests, unittest.TestCase):
    all_model_classes = (
        ReZeroModel,
        ReZeroForMaskedLM,
        ReZeroForSequenceClassification,
        ReZeroForTokenClassification,
    )
    model_tester = TextModels(is_causal=False)


@leave_out
class ResNetTest(ImageTests, unittest.TestCase):
    all_model_classes = (ReZeroResNetModel, ReZeroResNetForImageClassification)
    model_tester = ImageModels(ReZeroResNetConfig, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])


@leave_out
class MLPTest(ImageTests, unittest.TestCase):
    all_model_classes = (ReZeroMLPModel, ReZeroMLPForImageClassification)
    model_tester = ImageModels(ReZeroMLPConfig, image_size=ImageModels.image_size, num_hidden_layers=2, hidden_size=16)


class RewrittenTests(ModelTesterMixin):
    """The tests of every model, of models of transformers after `rezero_`."""

    test_can_init_all_missing_weights_before_2023 = True

    def test_config(self):
        config = self.model_tester.get_config()
        options = {"has_text_modality": hasattr(config, "vocab_size"), "common_properties": None}
        recorded = {name: getattr(config, name) for name in ("rewritten", "original_config_class", "auto_map")}
        ConfigTester(self, type(config), **options, **recorded).run_common_tests()


def rewritten(*stock: type) -> tuple[type, ...]:
    """The classes of their rewritten models."""
    return tuple(map(rewritten_class, stock))


@leave_out
class RewrittenLlamaTest(RewrittenTests, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = rewritten(
        LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification
    )
    model_tester = RewrittenModels(LlamaConfig, LlamaForCausalLM)


@leave_out
class RewrittenGPT2Test(RewrittenTests, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = rewritten(GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification)
    model_tester = RewrittenModels(GPT2Config, GPT2LMHeadModel)
    training_overfit_steps = 600  # with dropout


@leave_out
class RewrittenBertTest(RewrittenTests, unittest.TestCase):
    all_model_classes = rewritten(
        BertModel, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification
    )
    model_tester = RewrittenModels(BertConfig, BertForMaskedLM)


@leave_out
class RewrittenViTTest(RewrittenTests, unittest.TestCase):
    all_model_classes = rewritten(ViTModel, ViTForImageClassification)
    model_tester = RewrittenModels(ViTConfig, ViTForImageClassification)
    test_resize_embeddings = False
