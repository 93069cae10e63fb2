"""What was merged into the base: one more low-rank term per client, everywhere the adapters go."""

import json
from dataclasses import replace

import pytest
import torch
from peft_folders import FP32, export, trained
from plain import initial_models, own_state
from safetensors import safe_open
from safetensors.torch import load_file
from test_layer import CLIENTS, D_IN, D_OUT, DOUBLE, ROWS, TOKENS, in_training, random, stacked_linear
from test_peft_io import load_with_peft, logits_of

from peerlora.data.batches import collate
from peerlora.errors import ModelError
from peerlora.lora.adapter_init import redrawn
from peerlora.lora.merged import Merged, Update, consensus, distances2, whole
from peerlora.lora.peft_io import export_adapter
from peerlora.runtime.compose import compose
from peerlora.runtime.export import write_tensors
from peerlora.tree import leaves, rebuild

SHAPES = {"q": (D_OUT, D_IN), "v": (7, 9)}


def nothing(clients=CLIENTS):
    return Merged.nothing(SHAPES, torch.zeros(clients, 1, dtype=DOUBLE))


def product(name, columns, seed=0, clients=CLIENTS):
    d_out, d_in = SHAPES[name]
    return random(clients, d_out, columns, seed=seed), random(clients, columns, d_in, seed=seed + 1)


def filled(columns, clients=CLIENTS):
    """Updates of so many columns and their dense values."""
    products = {name: product(name, columns, 10, clients) for name in SHAPES}
    return nothing(clients).plus(products), {name: left @ right for name, (left, right) in products.items()}


def same(found, expected, tolerance=1e-12):
    return torch.allclose(found, expected, rtol=0, atol=tolerance)


# --- the sums themselves


def test_sums_add_up_and_become_dense_where_that_is_smaller():
    found, total = nothing(), {name: 0.0 for name in SHAPES}
    for step in range(1, 6):
        products = {name: product(name, 1, step) for name in SHAPES}
        found = found.plus(products)
        for name, (left, right) in products.items():
            total[name] = total[name] + left @ right
            d_out, d_in = SHAPES[name]
            update = found.layers[name]
            assert same(update.weight(), total[name])
            assert bool(update.dense.shape[2]) == (step * (d_in + d_out) > d_in * d_out)
            stored = sum(leaf[0].numel() for leaf in (update.left, update.right, update.dense))
            assert stored == min(step * (d_in + d_out), d_in * d_out)
    assert found.layers["q"].dense.shape[2] and not nothing().layers["q"].dense.shape[2]


def test_padding_of_smaller_ranks_is_not_kept():
    left, right = product("v", 3)
    left[:, :, 1], right[:, 1] = 0, 0
    update = nothing().layers["v"].plus(left, right)
    assert update.left.shape[2] == update.right.shape[1] == 2 and same(update.weight(), left @ right)


def test_one_product_can_serve_all_clients():
    left, right = product("v", 2, clients=1)
    update = nothing().layers["v"].plus(left, right)
    assert same(update.weight(), (left @ right).expand(CLIENTS, -1, -1))


@pytest.mark.parametrize("columns", [0, 1, 2, 9])
def test_rows_of_clients_go_out_and_in_again(columns):
    whole_one, dense = filled(columns)
    assert all(same(own.weight(), dense[name][[2, 0]]) for name, own in whole_one.rows([2, 0]).layers.items())
    assert all(same(own.weight(), dense[name][1:]) for name, own in whole_one.rows(slice(1, 3)).layers.items())
    more = nothing(2).plus({name: product(name, 2, 30, 2) for name in SHAPES})
    found = whole_one.with_rows([([2], more.rows([0])), ([0], more.rows([1]))])
    for name, own in found.layers.items():
        expected = dense[name].clone()
        expected[[2, 0]] = more.layers[name].weight()
        assert same(own.weight(), expected)


@pytest.mark.parametrize("common", ["neither", "left", "right"])
@pytest.mark.parametrize("columns", [1, 9])
def test_the_mean_of_products_is_exact_and_no_wider_than_it_must_be(common, columns):
    left, right = product("v", columns)
    left = left[:1].expand_as(left) if common == "left" else left
    right = right[:1].expand_as(right) if common == "right" else right
    found = nothing().layers["v"].plus(left, right).mean()
    assert same(found.weight(), (left @ right).mean(0, keepdim=True))
    if columns == 1:
        assert found.left.shape[2] == (CLIENTS if common == "neither" else 1)


def test_equal_clients_have_themselves_as_mean_to_the_bit():
    for columns in (1, 9):
        update = filled(columns)[0].layers["v"].rows([1, 1, 1])
        assert torch.equal(update.mean().weight(), update.weight()[:1])


@pytest.mark.parametrize("columns", [(2, 3), (2, 9), (9, 9)])
def test_whole_updates_are_compared_as_dense_ones(columns):
    one, other = (filled(count)[0].layers["v"] for count in columns)
    B, A = product("v", 2, 50)
    one, other = whole(one, B, A), whole(other, -B, A)
    P = one.weight()
    assert same(P, filled(columns[0])[1]["v"] + B @ A)
    assert float(consensus(one)) == pytest.approx(float((P - P.mean(0)).square().sum()) / CLIENTS)
    assert same(distances2(one, other), (other.weight() - P).square().sum((1, 2)), 1e-9)


def test_a_message_holds_the_columns_in_use():
    found = nothing().layers["v"].plus(*product("v", 3))
    found.left[1, :, 1:] = 0
    told = Merged({"v": found})
    assert [told.message(i)["left:v"][0] for i in range(CLIENTS)] == [(7, 3), (7, 1), (7, 3)]
    assert told.message(1)["right:v"] == ((1, 9), DOUBLE)


# --- among the adapters


@pytest.fixture
def federation(config):
    return compose(config("bert"))


def with_merges(x, columns=2, seed=7):
    """Adapters of which every client has merged something else."""
    products = {}
    for k, layer in enumerate(x.spec.layers):
        left = 0.3 * random(x.clients, layer.d_out, columns, seed=seed + k)
        products[layer.name] = left, 0.3 * random(x.clients, columns, layer.d_in, seed=seed + 50 + k)
    return replace(x, merged=x.with_empty_merges().merged.plus(products))


def test_adapters_carry_their_merges(federation):
    x = with_merges(trained(federation))
    name = next(iter(x.A))
    W = x.merged.layers[name].weight()
    assert torch.equal(x.rows([2, 1]).merged.layers[name].weight(), W[[2, 1]])
    assert torch.equal(x.select("B").merged.layers[name].weight(), W)
    assert torch.equal(x.with_blocks(x.select("A")).merged.layers[name].weight(), W)
    assert torch.equal(x.to("cpu").merged.layers[name].weight(), W)
    assert same(x.mean().merged.layers[name].weight(), W.mean(0, keepdim=True))
    assert x.message() == replace(x, merged=None).message()


def test_folding_moves_the_product_and_nothing_else(federation):
    x = with_merges(trained(federation))
    y = x.fold()
    for name, A in x.A.items():
        update = x.scaling[:, None, None] * x.B[name] @ A
        assert same(y.merged.layers[name].weight(), x.merged.layers[name].weight() + update)
    assert not y.select("B").flat.any() and torch.equal(y.select("A").flat, x.select("A").flat)
    assert torch.equal(y.select("head").flat, x.select("head").flat)


@pytest.mark.parametrize("block", ["A", "B"])
def test_a_factor_is_drawn_anew_for_all_alike(config, block):
    x = trained(compose(config("bert", "algorithm.name=local", "adapter.rank=[1, 3, 2, 3]")))
    y = redrawn(x, block, torch.Generator().manual_seed(4))
    drawn, other = y.select(block), y.select("B" if block == "A" else "A")
    assert not other.flat.any() and torch.equal(drawn.flat[1], drawn.flat[3])
    for name in y.A:
        factor = getattr(y, block)[name]
        own = factor[0, :1] if block == "A" else factor[0, :, :1]
        assert torch.equal(own, factor[1, :1] if block == "A" else factor[1, :, :1]) and own.any()
        assert not (factor[0, 1:] if block == "A" else factor[0, :, 1:]).any()
        assert factor.abs().max() <= factor.shape[2 if block == "A" else 1] ** -0.5


def test_the_start_of_a_run_draws_what_it_always_drew(federation):
    x = federation.start
    again = redrawn(x, "A", torch.Generator().manual_seed(1))
    assert {name: A.shape for name, A in again.A.items()} == {name: A.shape for name, A in x.A.items()}
    assert x.merged is None and list(leaves(x)) == [".flat", ".ranks"]


@pytest.mark.parametrize("columns", [1, 2, 16])
def test_a_checkpoint_comes_back_into_a_fresh_start(federation, columns):
    x = with_merges(trained(federation), columns)
    back = rebuild(federation.start.with_empty_merges(), {name: leaf.clone() for name, leaf in leaves(x).items()})
    assert all(torch.equal(leaf, leaves(back)[name]) for name, leaf in leaves(x).items())
    assert leaves(federation.start.with_empty_merges()).keys() == leaves(x).keys()


# --- the forward passes


@pytest.mark.parametrize("shape", [(CLIENTS * ROWS, D_IN), (CLIENTS * ROWS, TOKENS, D_IN)])
@pytest.mark.parametrize("columns", [1, 5])
def test_a_stacked_linear_adds_what_was_merged(shape, columns):
    layer, x = stacked_linear(), random(*shape).requires_grad_()
    layer.merged = nothing().layers["q"].plus(*product("q", columns))
    y = layer(x)
    for i in range(CLIENTS):
        own = slice(i * ROWS, (i + 1) * ROWS)
        update = layer.step.scaling[i] * layer.B[i] @ layer.A[i] + layer.merged.weight()[i]
        expected = x[own] @ (layer.base.weight + update).T + layer.base.bias
        assert same(y[own], expected)
        (ours,), (theirs,) = (
            torch.autograd.grad(value.square().sum(), x, retain_graph=True) for value in (y[own], expected)
        )
        assert same(ours, theirs)


def test_adapter_dropout_does_not_reach_what_was_merged():
    step = in_training(0.5, [ROWS] * CLIENTS, [TOKENS] * CLIENTS)
    layer, x = stacked_linear(p=0.5, step=step), random(CLIENTS * ROWS, TOKENS, D_IN)
    with torch.no_grad():
        layer.A.zero_()
    layer.merged = nothing().layers["q"].plus(*product("q", 1))
    update = torch.einsum("ioc,irtc->irto", layer.merged.weight(), x.view(CLIENTS, ROWS, TOKENS, D_IN))
    assert same(layer(x), layer.base(x) + update.reshape(CLIENTS * ROWS, TOKENS, D_OUT))


def stacked_logits(federation, x, forward):
    data = federation.train_data
    batch = collate(data, [torch.arange(3 * i, 3 * i + 3).numpy() for i in range(x.clients)], 0, x.flat.dtype)
    views = [x.spec.view(slot, x.flat).detach().requires_grad_() for slot in x.spec.slots]
    federation.model.bind(x.spec, views, x.scaling, x.merged)
    logits = forward(batch.inputs)
    return logits, torch.autograd.grad(logits.square().sum(), views), batch


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("columns", [2, 16])
def test_packed_and_padded_tokens_agree_in_values_and_gradients(config, kind, columns):
    federation = compose(config(kind, "adapter.targets=[query, value, intermediate.dense, output.dense]"))
    x = with_merges(trained(federation), columns)
    assert federation.paths["packed tokens"] is None
    packed, its, _ = stacked_logits(federation, x, federation.model.forward)
    padded, theirs, _ = stacked_logits(federation, x, federation.model.plain)
    assert same(packed, padded, 1e-10)
    assert all(same(a, b, 1e-9) for a, b in zip(its, theirs, strict=True))
    without, _, _ = stacked_logits(federation, replace(x, merged=None), federation.model.forward)
    assert (packed - without).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_it_equals_a_peft_model_whose_base_was_really_changed(config, kind):
    chosen = config(kind)
    federation = compose(chosen)
    x = with_merges(trained(federation))
    logits, gradients, batch = stacked_logits(federation, x, federation.model.forward)
    names = [f"{slot.block} {slot.name}" for slot in x.spec.slots]
    models = initial_models(chosen, compose(chosen))
    for i, model in enumerate(models):
        model.load_state_dict(changed(model, x, i), strict=False)
        own = slice(3 * i, 3 * i + 3)
        theirs = model(**{name: value[own] for name, value in batch.inputs.items()}).logits
        assert same(logits[own], theirs, 1e-10)
        name = next(iter(x.A))
        parameter = dict(model.named_parameters())[f"base_model.model.{name}.lora_B.default.weight"]
        (gradient,) = torch.autograd.grad(theirs.square().sum(), parameter)
        assert same(gradients[names.index(f"B {name}")][i], gradient, 1e-9)


def changed(model, x, i):
    """The model's tensors with client i's adapter, and with its merges added to the base weights."""
    state = model.state_dict()
    for name, value in own_state(x, i).items():
        for key in (
            name.replace(".weight", ".default.weight"),
            name.replace("classifier.", "classifier.modules_to_save.default."),
            name.replace("score.", "score.modules_to_save.default."),
        ):
            if key in state and state[key].shape == value.shape:
                state[key] = value
    for name, update in x.merged.layers.items():
        key, W = f"base_model.model.{name}.base_layer.weight", update.weight()[i]
        state[key] = state[key] + (W.T if state[key].shape != W.shape or "c_attn" in name else W)
    return state


def test_equal_factors_on_different_bases_are_evaluated_one_by_one(federation):
    x = with_merges(federation.start)
    scores = federation.learner.evaluate(x, federation.eval_data, 16)
    for i in range(4):
        alone = federation.learner.evaluate(x.rows([i]), federation.eval_data, 16)
        assert scores.loss[i] == pytest.approx(alone.loss[0], abs=1e-12)
    assert len(set(scores.loss.round(9))) == 4


def test_training_sees_what_was_merged_and_never_changes_it(federation):
    x = with_merges(federation.start)
    with federation.learner.round(0):
        y = federation.learner.fit(x, "AB")
        bare = federation.learner.fit(replace(x, merged=None), "AB")
        assert y.merged is x.merged and bare.merged is None
        assert (y.flat - bare.flat).abs().max() > 1e-4
        federation.learner.fit(federation.start, "AB")
    assert all(layer.merged is None for layer in federation.model._layers.values())


# --- folders


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("columns", [2, 16])
def test_peft_gives_the_client_s_logits_from_a_grown_rank(config, tmp_path, kind, columns):
    chosen = config(kind, FP32)
    federation = compose(chosen)
    x = with_merges(trained(federation), columns)
    x = replace(x, merged=x.merged and rebuild(x.merged, {k: v.float() for k, v in leaves(x.merged).items()}))
    export(federation, tmp_path, x, 2)
    ours, inputs = logits_of(federation, x, 2)
    loaded = load_with_peft(chosen.model.source, "sequence-classification", tmp_path)
    with torch.no_grad():
        theirs = loaded(**inputs).logits
    assert (ours - theirs).abs().max() <= 5e-6 * float(theirs.abs().max().clamp_min(1))
    bare, _ = logits_of(federation, replace(x, merged=None), 2)
    assert (ours - bare).abs().max() > 1e-3
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] == (5 if columns == 2 else 16)


def test_low_rank_merges_are_written_as_they_are(config, tmp_path):
    federation = compose(config("bert"))
    x = with_merges(trained(federation))
    tensors = load_file(export(federation, tmp_path, x, 1) / "adapter_model.safetensors")
    for name, A in x.A.items():
        own = x.merged.layers[name]
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], torch.cat([A[1], own.right[1]]))
        grown = torch.cat([x.scaling[1] * x.B[name][1], own.left[1]], 1)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], grown)


def test_an_adapter_that_merged_nothing_yet_is_its_factors(config, tmp_path):
    federation = compose(config("bert"))
    x = trained(federation)
    tensors = load_file(export(federation, tmp_path, x.with_empty_merges(), 1) / "adapter_model.safetensors")
    for name, A in x.A.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], A[1])


@pytest.mark.parametrize("columns", [2, 16])
@pytest.mark.parametrize("merged", [True, False])
def test_a_cut_export_is_the_best_of_its_rank_and_tells_the_error(config, tmp_path, columns, merged):
    federation = compose(config("bert"))
    x = with_merges(trained(federation), columns)
    x = x if merged else replace(x, merged=None)
    context = replace(federation.export, facts={"rounds": 3})
    export_adapter(tmp_path, x, 1, federation.model, context, rank=2)
    tensors, lost2, size2 = load_file(tmp_path / "adapter_model.safetensors"), 0.0, 0.0
    for name, A in x.A.items():
        W = x.scaling[1] * x.B[name][1] @ A[1] + (x.merged.layers[name].weight()[1] if merged else 0)
        B, A = (tensors[f"base_model.model.{name}.lora_{f}.weight"] for f in "BA")
        values = torch.linalg.svdvals(W).square()
        assert float((W - B @ A).square().sum()) == pytest.approx(float(values[2:].sum()))
        lost2, size2 = lost2 + float(values[2:].sum()), size2 + float(values.sum())
    card = (tmp_path / "README.md").read_text()
    assert f"| left out | {lost2**0.5:.4g}, {(lost2 / size2) ** 0.5:.2%} of the update" in card
    assert "Rank 2, alpha 2" in card and "| rounds | 3 |" in card


def test_a_grown_folder_as_a_start_is_refused_or_taken_by_its_rank(config, tmp_path):
    federation = compose(config("bert", FP32))
    x = with_merges(trained(federation))
    x = replace(x, merged=rebuild(x.merged, {k: v.float() for k, v in leaves(x.merged).items()}))
    folder = export(federation, tmp_path / "grown", x, 1)
    with pytest.raises(ModelError, match="has rank 5 and alpha 5; the config has rank \\[3\\] and alpha 6"):
        compose(config("bert", FP32, f"adapter.start={folder}"))
    start = compose(config("bert", FP32, f"adapter.start={folder}", "adapter.rank=5", "adapter.alpha=5")).start
    for name, A in x.A.items():
        W = x.scaling[1] * x.B[name][1] @ A[1] + x.merged.layers[name].weight()[1]
        assert same(start.B[name][3] @ start.A[name][3], W, 1e-6)


def test_the_file_of_all_clients_holds_merges_and_nothing_without(config, tmp_path):
    federation = compose(config("bert"))
    for x, names in (
        (trained(federation), {"flat", "ranks"}),
        (with_merges(trained(federation)), None),
    ):
        write_tensors(tmp_path, x)
        with safe_open(tmp_path / "adapters" / "all.safetensors", framework="pt") as file:
            assert names is None or set(file.keys()) == names
            back = rebuild(x, {f".{name}": file.get_tensor(name) for name in file.keys()})
        assert all(torch.equal(leaf, leaves(x)[name]) for name, leaf in leaves(back).items())
    assert isinstance(back.merged.layers[next(iter(back.A))], Update)
