import pytest
import torch
from torch import nn

from peerlora.config.task_kinds import task_kind
from peerlora.errors import ModelError
from peerlora.lora.adapters import LayerSpec, initial_adapters
from peerlora.lora.attach import StackedModel, find_targets
from peerlora.lora.base_models import load_base
from peerlora.lora.layer import ClientDropout, StackedHead, StackedLinear
from peerlora.runtime.compose import compose

LABELS = ("a", "b", "c")
TASK = {"bert": "classification", "roberta": "classification", "llama": "causal-lm", "gpt2": "causal-lm"}


def base_of(models, kind, task=None):
    return load_base(models(kind), task or TASK[kind], LABELS, 0, 0, torch.float64).model


def found(models, kind, targets=None, task=None):
    return find_targets(base_of(models, kind, task), task_kind(task or TASK[kind]).peft_type, targets)


def endings(targets):
    return [layer.name.rsplit(".", 1)[-1] for layer in targets.layers]


@pytest.mark.parametrize(
    ("kind", "names", "heads"),
    [
        ("bert", ["query", "value"], ("classifier",)),
        ("roberta", ["query", "value"], ("classifier",)),
        ("llama", ["q_proj", "v_proj"], ()),
        ("gpt2", ["c_attn"], ()),
    ],
)
def test_targets_by_pefts_defaults(models, kind, names, heads):
    targets = found(models, kind)
    assert endings(targets) == names * 2 and targets.heads == heads


def test_layer_specs_have_the_shapes_of_the_layers(models):
    # One key-value head of two: v_proj is half as wide.  GPT-2 stores weights transposed, as [in, out].
    assert [(layer.d_in, layer.d_out) for layer in found(models, "llama").layers] == [(16, 16), (16, 8)] * 2
    assert [(layer.d_in, layer.d_out) for layer in found(models, "gpt2").layers] == [(16, 48)] * 2
    first = found(models, "bert").layers[0]
    assert first == LayerSpec("bert.encoder.layer.0.attention.self.query", 16, 16)


def test_targets_as_endings_and_as_a_regular_expression(models):
    listed = found(models, "bert", ["key", "intermediate.dense"])
    assert endings(listed) == ["key", "dense"] * 2 and listed.layers[1].d_out == 24
    pattern = found(models, "bert", r".*layer\.1\.attention\.self\.(query|key)")
    assert [layer.name for layer in pattern.layers] == [
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.self.key",
    ]
    assert pattern.heads == ("classifier",)


@pytest.mark.parametrize(
    ("kind", "each", "others"),
    [
        ("bert", ["query", "key", "value", "dense", "dense", "dense"], ["dense"]),
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], []),
        ("gpt2", ["c_attn", "c_proj", "c_fc", "c_proj"], []),
    ],
)
def test_all_linear_takes_every_linear_layer_but_the_output(models, kind, each, others):
    targets = found(models, kind, "all-linear")
    assert endings(targets) == each * 2 + others
    assert not {layer.name for layer in targets.layers} & {"classifier", "lm_head"}


def test_no_match_lists_the_layers_that_exist(models):
    with pytest.raises(
        ModelError,
        match=r"adapter\.targets=\['quarry'\].*linear layers that exist: query, key, value, dense.*name some of",
    ):
        found(models, "bert", ["quarry"])
    with pytest.raises(ModelError, match="no layer of BertForSequenceClassification matches"):
        found(models, "bert", "nothing.*")


def test_a_match_of_whole_blocks_is_told_in_one_line(models):
    """PEFT prints the module that it cannot adapt over many lines."""
    with pytest.raises(ModelError, match=r"Target module.*linear layers that exist") as refused:
        found(models, "bert", ".*layer.*")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_a_broken_regular_expression_is_a_model_error(models):
    with pytest.raises(ModelError, match="targets"):
        found(models, "bert", "(query")


def test_an_unknown_model_type_without_targets_is_refused():
    class Config(dict):
        model_type = "homemade"

        def to_dict(self):
            return {"model_type": self.model_type}

    class Homemade(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.inner = nn.Sequential(nn.Linear(4, 4))

    with pytest.raises(ModelError, match="PEFT's default for Homemade"):
        find_targets(Homemade(Config()), None, None)
    assert endings(find_targets(Homemade(Config()), None, ["0"])) == ["0"]


def test_only_linear_layers_can_be_targets(models):
    with pytest.raises(
        ModelError, match="word_embeddings is a Embedding; adapter.targets can adapt linear layers only"
    ):
        found(models, "bert", ["query", "word_embeddings"])


def test_looking_for_targets_leaves_the_model_alone(models):
    base = base_of(models, "bert")
    before = [(name, type(module)) for name, module in base.named_modules()]
    find_targets(base, "SEQ_CLS", None)
    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert not any(parameter.is_meta for parameter in base.parameters())


def inputs():
    ids = torch.tensor([[1, 5, 9, 2], [1, 7, 2, 0], [1, 8, 6, 2], [1, 30, 2, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def attached(base, kind, **options):
    targets = find_targets(base, task_kind(TASK[kind]).peft_type, None)
    return StackedModel(base, targets, train_head=True, **options)


@pytest.mark.parametrize("kind", list(TASK))
def test_detach_puts_back_the_modules_and_the_logits_bit_for_bit(models, kind):
    base = base_of(models, kind).eval()
    before, logits = dict(base.named_modules()), base(**inputs()).logits
    model = attached(base, kind, dropout=0.1, base_dropout=0.2)
    kinds = {type(module) for module in base.modules()}
    assert StackedLinear in kinds and (StackedHead in kinds) == (kind in ("bert", "roberta"))
    assert (ClientDropout in kinds) == (kind != "llama"), "llama has no dropout layers"
    assert model.detach() is base
    assert dict(base.named_modules()) == before
    assert torch.equal(base(**inputs()).logits, logits)


@pytest.mark.parametrize("kind", list(TASK))
def test_a_start_with_B_zero_gives_the_bases_own_logits(models, kind):
    base = base_of(models, kind).eval()
    logits = base(**inputs()).logits
    model = attached(base, kind)
    spec = model.spec(2, 4.0)
    model.bind_adapters(initial_adapters(spec, [2, 2], model.head(), torch.Generator(), torch.float64))
    assert torch.allclose(model(inputs()), logits, rtol=0, atol=1e-12)


def test_the_trained_head_is_the_bases_head(models):
    base = base_of(models, "roberta")
    model = attached(base, "roberta")
    names = [
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ]
    assert list(model.head()) == names
    assert torch.equal(model.head()["classifier.dense.weight"], base.classifier.dense.base.weight)
    frozen = StackedModel(model.detach(), find_targets(base, "SEQ_CLS", None), train_head=False)
    assert frozen.head() == {} and frozen.spec(2, 4.0).columns("head") == slice(0, 0)


def test_a_head_that_is_not_linear_is_refused(models):
    base = base_of(models, "bert")
    base.classifier = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(ModelError, match="classifier.1; only linear heads train; set adapter.head=frozen"):
        StackedModel(base, find_targets(base_of(models, "bert"), "SEQ_CLS", None), train_head=True)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_training_never_touches_the_base(config, kind):
    words = ["task.kind=causal-lm", "data.label=null"] if kind == "gpt2" else []
    federation = compose(config(kind, *words, "train.weight_decay=0.1"))
    base = federation.model.base
    before = {name: value.clone() for name, value in base.named_parameters()}
    x = federation.learner.fit(federation.start, "AB")
    federation.learner.evaluate(x, federation.eval_data, 8)
    assert not torch.equal(x.flat, federation.start.flat)
    after = dict(base.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(value.grad is None and not value.requires_grad for value in after.values())
