"""Plain loops over a base that bitsandbytes keeps in 4 bits, as many LoRA users have it."""

import pytest
import torch
from in_memory import network, together
from loop_rigs import alone, batches, joined, optimizer_of, own_settings, peft_model, read, take_steps
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from plain import loss_of
from test_plain_loops import TRAIN

from peerlora.algorithms import REGISTRY
from peerlora.errors import CompositionError, ModelError, PeerloraError
from peerlora.lora.peft_model import PeftAdapter
from peerlora.runtime.compose import compose

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_reports")]
WORDS = ["clients=2", "topology.kind=complete", "train.dtype=fp32", "train.lr=0.01", "peer.join=20"]


def quantised(source, double=False):
    """As a user makes it; heads stay as they are.  ``double``: scales of weights are quantised too."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing; make test-slow installs it")
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    torch.manual_seed(0)
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=["classifier", "pooler"],
    )
    base = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=3, quantization_config=four, device_map={"": "cpu"}
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(base, lora).eval()


def four_bit_layers(model):
    return [module for module in model.modules() if type(module).__name__ == "Linear4bit"]


def evaluated(model, federation, rows):
    """The loss of a forward pass in evaluation mode without gradients."""
    with torch.no_grad():
        return float(loss_of(model, federation.train_data, rows, "classification"))


@pytest.fixture
def chosen(config):
    return config("bert", "algorithm.name=dec-lora", *TRAIN, *WORDS)


def test_loops_over_a_base_in_4_bits_mix_their_adapters(chosen, tmp_path):
    federation = compose(chosen)
    models = [quantised(chosen.model.source) for _ in range(2)]
    adapters = [PeftAdapter(model) for model in models]
    assert adapters[0].quantisation == "nf4"
    assert {layer.weight.dtype for layer in four_bit_layers(models[0])} == {torch.uint8}, "two weights to a byte"
    digests, lost = {each.digest() for each in adapters}, []
    with network(2) as (net, thread):

        def one(client):
            model, rows = models[client], batches(chosen, federation, client)
            optimizer = optimizer_of(chosen, model)
            with joined(chosen, tmp_path, client, net, thread, model, optimizer) as peer:
                before = read(model), sum(evaluated(model, federation, own) for own in rows)
                take_steps(peer, model, optimizer, chosen, federation, rows)
            lost.append(before[1] - sum(evaluated(model, federation, own) for own in rows))
            return before[0], peer.result.adapters.flat[0]

        results = together([lambda client=client: one(client) for client in range(2)])
    for model, (before, after) in zip(models, results, strict=True):
        assert (after - before).abs().max() > 1e-3, "something was learned"
        assert torch.equal(read(model), after)
    assert torch.allclose(results[0][1], results[1][1], rtol=0, atol=1e-6), "the last round averages both"
    assert sum(lost) > 0, "the loss falls"
    assert {PeftAdapter(model).digest() for model in models} == digests and len(digests) == 1, "the base is as it was"


@pytest.mark.parametrize("method", sorted(name for name, each in REGISTRY.items() if each.traits.merges_into))
def test_methods_that_merge_into_a_base_in_4_bits_are_refused(chosen, tmp_path, method):
    model = quantised(chosen.model.source)
    settings = own_settings(chosen) | {"algorithm": {"name": method}, "clients": 1}
    with pytest.raises(CompositionError, match=f"{method} cannot.*it merges products into the base model"):
        with alone(chosen, tmp_path, model, optimizer_of(chosen, model), settings=settings):
            pass
    assert not (tmp_path / "peer-0").exists()


def changed_codes(model):
    """Another value in each byte of one layer."""
    with torch.no_grad():
        four_bit_layers(model)[0].weight.bitwise_xor_(0x11)


@pytest.mark.parametrize("other", ["codes", "double quantisation"])
def test_another_base_in_4_bits_than_the_neighbours_is_refused(chosen, tmp_path, other):
    models = [quantised(chosen.model.source), quantised(chosen.model.source, double=other != "codes")]
    if other == "codes":
        changed_codes(models[1])
    with network(2) as (net, thread):

        def told(client):
            model = models[client]
            try:
                with joined(chosen, tmp_path, client, net, thread, model, optimizer_of(chosen, model)):
                    return ""
            except PeerloraError as error:
                return str(error)

        found = together([lambda client=client: told(client) for client in range(2)])
    assert any("wrong-base" in each for each in found), found


def test_a_joined_base_keeps_its_order_on_processors_that_prefer_another(chosen):
    """Those with AVX512-BF16, by bitsandbytes' choice."""
    model = quantised(chosen.model.source)
    for layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = True
    PeftAdapter(model)
    assert four_bit_layers(model) and not any(layer.support_avx512bf16_for_cpu for layer in four_bit_layers(model))


def test_a_base_whose_weights_were_re_ordered_is_refused(chosen, tmp_path):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from bitsandbytes.nn import LinearNF4

    model = quantised(chosen.model.source)
    layer = LinearNF4(64, 64, bias=False).to("cpu")
    model.base_model.model.bert.pooler.dense = layer
    PeftAdapter(model)
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    reason = "re-ordered the weights of base_model.model.bert.pooler.dense .*load the base anew"
    for _ in range(2):
        with pytest.raises(ModelError, match=reason):
            with alone(chosen, tmp_path, model, optimizer_of(chosen, model)):
                pass
        model.state_dict()  # which puts the weights back, and not their scales
    assert not (tmp_path / "peer-0").exists()


@pytest.mark.parametrize("state", ["keep", "round"])
def test_an_optimiser_of_8_bits_trains_one_factor_and_keeps_the_memory_of_the_other(config, tmp_path, state):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing; make test-slow installs it")
    words = ["clients=1", "topology.kind=complete", "peer.join=1", "train.dtype=fp32", f"train.optimizer_state={state}"]
    chosen = config("bert", "algorithm.name=adf-lora", "algorithm.interval=1", "train.rounds=3", *words)
    federation = compose(chosen)
    model = peft_model(chosen, federation)
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = bitsandbytes.optim.AdamW8bit(list(named.values()), lr=0.01, weight_decay=0.5, min_8bit_size=16)
    rows = batches(chosen, federation, 0)[0]

    def memory(block):
        own = [optimizer.state.get(value, {}) for name, value in named.items() if f"lora_{block}" in name]
        return [each["state1"].clone() for each in own if "state1" in each]

    with alone(chosen, tmp_path, model, optimizer) as peer:
        for trained, held in (("B", "A"), ("A", "B"), ("B", "A")):
            still = [value.detach().clone() for name, value in named.items() if f"lora_{held}" in name]
            before = memory(held)
            for _ in range(chosen.train.local_steps):
                loss_of(model, federation.train_data, rows, "classification").backward()
                optimizer.step()
                optimizer.zero_grad()
                assert all(each.dtype == torch.uint8 for each in memory(trained)) and memory(trained)
                after = [value for name, value in named.items() if f"lora_{held}" in name]
                assert all(torch.equal(value, was) for value, was in zip(after, still, strict=True))
                assert all(torch.equal(each, was) for each, was in zip(memory(held), before, strict=True))
                peer.step()

        assert peer.over
