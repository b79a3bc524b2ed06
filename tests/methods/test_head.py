"""What a head reads is found by following the logit: every kind of head on every architecture is right, or
refused by name.
"""

from itertools import product

import pytest
import torch
import transformers
from chefer import direct, relative
from models import DECODER, EAGER_ALONE, IMAGE, PRE_NORM, SMALL, build, random_batch, randomize
from published import published_maps, published_rollout
from sweeps import sweep
from tiny import tokenizer
from torch import nn

import pyglobenc
from pyglobenc import GlobEnc, Rollout, TransformerAttribution
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.registry import METHODS, RELEVANCE

# relative L2 in float64: rounding, amplified up to 1e6 times on random weights
TOLERANCE = 1e-8
ENCODERS = ("bert", "roberta", "electra", "distilbert", "vit")
CLASSES = 3


def encoder(name):
    """An architecture's model without its head."""
    return build(name, add_pooling_layer=False).base_model if name == "vit" else build(name).base_model


def first(h, mask):
    return h[:, 0]


def last(h, mask):
    return h[torch.arange(len(h)), mask.sum(1) - 1]


def mean(h, mask):
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def total(h, mask):
    return torch.einsum("bn,bnd->bd", mask.to(h.dtype), h)


def filled(h, mask):
    h[mask == 0] = 0
    return h.sum(1) / mask.sum(1, keepdim=True)


def without_ends(h, mask):
    inner = mask.clone()
    inner[:, 0] = 0
    return mean(h, inner)


def maximum(h, mask):
    return h.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)


def shares(h, mask):
    return mask / mask.sum(1, keepdim=True)


def inner_shares(h, mask):
    inner = mask.clone()
    inner[:, 0] = 0
    return shares(h, inner)


class Wrapped(nn.Module):
    """The user's module: an encoder, what it reads, and Linear modules with activations."""

    def __init__(self, name, pool, depth=2, act=None, returns="tensor"):
        super().__init__()
        self.encoder, self.pool, self.returns = encoder(name), pool, returns
        d = self.encoder.config.hidden_size
        self.drop, self.act = nn.Dropout(0.3), act or nn.Tanh()
        # a module that the logit doesn't depend on
        self.unused = nn.Linear(d, d)
        self.hidden = nn.ModuleList([nn.Linear(d, d) for _ in range(depth - 1)])
        self.top = nn.Linear(d, CLASSES)
        randomize(self).double().eval()

    def states(self, **inputs):
        return self.encoder(**inputs).last_hidden_state

    def forward(self, **inputs):
        h = self.states(**inputs)
        mask = inputs.get("attention_mask", torch.ones(h.shape[:2], dtype=torch.long))
        self.unused(h[:, 0])
        h = self.drop(self.pool(h, mask))
        for module in self.hidden:
            h = self.drop(self.act(module(h)))
        logits = self.top(h)
        kinds = {"tensor": logits, "tuple": (logits.sum(), logits), "dict": {"logits": logits, "hidden": h}}
        return kinds[self.returns]


def alone(batch, b):
    """One example without its padding."""
    if "attention_mask" not in batch:
        return {"pixel_values": batch["pixel_values"][b : b + 1]}
    n = int(batch["attention_mask"][b].sum())
    return {name: t[b : b + 1, :n] for name, t in batch.items()}


def check_relevance(model, batch, head, read, select):
    """Scores of a batch against the rules on each example alone; read: what the head reads, positions (B,) or
    shares.
    """
    results = [
        TransformerAttribution(model)(**batch, target=1, reliability=how) for how in ("off", "measured")
    ]
    for b in range(len(results[0].scores)):
        one = alone(batch, b)
        where = {"weights": read(b)} if torch.is_tensor(read(b)) else {"position": read(b)}
        scores, _ = direct(
            model,
            one,
            lambda out: select(out)[0, 1],
            [(head[0], head[0].weight[1].detach()[None]), *head[1:]],
            **where,
        )
        for result in results:
            n = result.scores.shape[1]
            # images without [CLS]
            assert relative(result.scores[b, : len(scores)], scores[-n:]) <= TOLERANCE
            assert not result.scores[b, len(scores) :].any()
            assert (result.position is None) == ("weights" in where)
            if result.position is not None:
                assert result.position[b] == where["position"]


def check_rows(model, batch, read):
    """GlobEnc's default against the rollout of the published maps from what the head reads."""
    rows = [GlobEnc(model)(**batch), GlobEnc(model)(**batch, layers=True)]
    stock = stock_model(model)
    for b in range(len(rows[0].scores)):
        one = alone(batch, b)
        maps = published_maps(stock.base_model, one)
        rollout = published_rollout(maps.get("N_Enc", maps["N_Res"]))[0]
        share = (
            read(b)
            if torch.is_tensor(read(b))
            else torch.eye(rollout.shape[-1], dtype=torch.float64)[read(b)]
        )
        exact = share @ rollout
        for result in rows:
            n = rollout.shape[-1]
            assert relative(result.scores[b, 0, :n] * result.log_scale[b, 0].exp(), exact[-1]) <= 1e-9
            assert not result.scores[b, 0, n:].any()
            assert (
                result.targets is None if torch.is_tensor(read(b)) else int(result.targets[b, 0]) == read(b)
            )
        layers = rows[1].layer_scores[b, :, 0, :n] * rows[1].layer_log_scale[b, :, 0, None].exp()
        assert relative(layers, exact) <= 1e-9


def reading(pool, batch, b, n):
    """What a pool reads of an example alone: a position, or shares (n,)."""
    if pool is first:
        return 0
    if pool is last:
        return n - 1
    start = 1 if pool is without_ends else 0
    share = torch.zeros(n, dtype=torch.float64)
    share[start:] = 1 / (n - start)
    return share


POOLS = {
    "first": first,
    "last": last,
    "mean": mean,
    "sum": total,
    "filled": filled,
    "without-ends": without_ends,
}


@pytest.mark.parametrize(
    "name, pool",
    sweep(
        product(ENCODERS, POOLS),
        [*product(("bert",), POOLS), *zip(ENCODERS, POOLS, strict=False)],
    ),
)
def test_a_module_around_an_encoder(name, pool):
    settings = {
        "first": dict(returns="tuple"),
        "last": dict(depth=1),
        "mean": dict(returns="dict", act=nn.ReLU(inplace=True)),
    }
    model = Wrapped(name, POOLS[pool], **settings.get(pool, {}))
    batch = random_batch(model.encoder, batch=2, n=11, pads=[0, 4])

    def read(b):
        n = len(batch["attention_mask"][b].nonzero()) if "attention_mask" in batch else 10
        return reading(POOLS[pool], batch, b, n)

    def select(out):
        return out[1] if isinstance(out, tuple) else out["logits"] if isinstance(out, dict) else out

    check_rows(model, batch, read)
    if pool in ("sum", "filled", "without-ends"):
        unit = {"sum": lambda share: (share > 0).double()}.get(pool, lambda share: share)
        check_relevance(model, batch, [model.top, *model.hidden], lambda b: unit(read(b)), select)
    else:
        check_relevance(model, batch, [model.top, *model.hidden], read, select)


class OwnSubclass(transformers.BertPreTrainedModel):
    """A user's class that extends transformers' own, with its encoder and its head under names of its own.

    Args:
        where: "bert", the name that transformers uses; or another name; or "list", inside another module.
        pool: what the head reads.
    """

    def __init__(self, config, where, pool):
        super().__init__(config)
        inner = nn.ModuleList([encoder("bert")]) if where == "list" else encoder("bert")
        self.add_module(where, inner)
        self.where, self.pool, self.top = where, pool, nn.Linear(config.hidden_size, CLASSES)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        inner = getattr(self, self.where)
        inner = inner[0] if self.where == "list" else inner
        return self.top(self.pool(inner(input_ids, attention_mask=attention_mask)[0], attention_mask))


@pytest.mark.parametrize("pool", [first, mean])
@pytest.mark.parametrize("where", ["bert", "encoder", "list"])
def test_a_user_s_subclass_of_pretrained_model(where, pool):
    model = randomize(OwnSubclass(transformers.BertConfig(**SMALL), where, pool)).double().eval()
    batch = random_batch(stock_model(model), batch=2, n=11, pads=[0, 4])

    def read(b):
        return reading(pool, batch, b, int(batch["attention_mask"][b].sum()))

    check_rows(model, batch, read)
    check_relevance(model, batch, [model.top], read, lambda out: out)


class Refused(Wrapped):
    """A head without a relevance rule, by name."""

    def __init__(self, kind, name="bert"):
        super().__init__(name, first)
        self.kind = kind
        d = self.encoder.config.hidden_size
        self.other, self.score, self.wide = nn.Linear(d, CLASSES), nn.Linear(d, 1), nn.Linear(3 * d, CLASSES)
        self.matrix, self.joint = nn.Parameter(torch.empty(d, CLASSES)), nn.LayerNorm((11, d))
        randomize(self).double().eval()

    def forward(self, input_ids, attention_mask=None):
        if self.kind == "siamese":
            one, two = (
                self.encoder(input_ids=ids).last_hidden_state[:, 0] for ids in (input_ids, input_ids.flip(1))
            )
            return self.top((one - two).abs())
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        h, states = out.last_hidden_state, out.hidden_states
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return getattr(self, self.kind)(h, h[:, 0], mask, states)

    def two_heads(self, h, cls, mask, states):
        return self.top(cls) + self.other(cls)

    def residual(self, h, cls, mask, states):
        return self.top(cls + self.act(self.hidden[0](cls)))

    def gated(self, h, cls, mask, states):
        return self.top(torch.sigmoid(self.unused(cls)) * self.hidden[0](cls))

    def probabilities(self, h, cls, mask, states):
        return self.top(cls).softmax(-1)

    def tempered(self, h, cls, mask, states):
        return self.top(cls) / 2

    def a_parameter(self, h, cls, mask, states):
        return cls @ self.matrix

    def mixed_features(self, h, cls, mask, states):
        return self.top(nn.functional.layer_norm(cls, cls.shape[-1:]))

    def mixed_tokens(self, h, cls, mask, states):
        return self.top(self.hidden[0](self.joint(h))[:, 0])

    def joined_tokens(self, h, cls, mask, states):
        return self.wide(h[:, :3].flatten(1))

    def joined_layers(self, h, cls, mask, states):
        return self.wide(torch.cat([state[:, 0] for state in states[-3:]], -1))

    def summed_layers(self, h, cls, mask, states):
        return self.top(sum(states[-2:])[:, 0])

    def an_earlier_layer(self, h, cls, mask, states):
        return self.top(states[-2][:, 0])

    def attention(self, h, cls, mask, states):
        weights = self.score(h).masked_fill(mask[..., None] == 0, -torch.inf).softmax(1)
        return self.top((weights * h).sum(1))

    def maximum(self, h, cls, mask, states):
        return self.top(maximum(h, mask))

    def weighted(self, h, cls, mask, states):
        weights = torch.arange(1, h.shape[1] + 1) * mask
        return self.top((weights[..., None] * h).sum(1) / weights.sum(1, keepdim=True))

    def two_tokens(self, h, cls, mask, states):
        return self.top(cls + 2 * h[:, 1])

    def squares(self, h, cls, mask, states):
        return self.top(mean(h.square(), mask))

    def token_logits(self, h, cls, mask, states):
        return mean(self.top(h), mask)

    def padding(self, h, cls, mask, states):
        return self.top(h.mean(1))

    def last_of_all(self, h, cls, mask, states):
        return self.top(h[:, -1])

    def without_gradients(self, h, cls, mask, states):
        with torch.no_grad():
            return self.top(cls)

    def constant(self, h, cls, mask, states):
        return self.top(torch.zeros_like(cls))


SHARES = "unequal shares"
# what the relevance rules say, and GlobEnc, or the token that it takes
REFUSALS = {
    "two_heads": ("several Linear modules in parallel, top and other", 0),
    "residual": ("between hidden.0 and top it mixes features", 0),
    "gated": ("between hidden.0 and top it mixes features", 0),
    "probabilities": ("isn't an output of top", 0),
    "tempered": ("isn't an output of top", 0),
    "a_parameter": ("no Linear module returns the logit", 0),
    "mixed_features": ("between the last layer and top it mixes features", 0),
    "mixed_tokens": ("joint normalises tokens together", "reads padding tokens"),
    "joined_tokens": ("joins or reshapes", SHARES),
    "joined_layers": ("earlier layers' outputs", "earlier layers' outputs"),
    "summed_layers": ("earlier layers' outputs", "earlier layers' outputs"),
    "an_earlier_layer": (
        "can't be followed to the last layer's output",
        "can't be followed to the last layer's output",
    ),
    "attention": ("reads several tokens, but neither their sum nor their mean", SHARES),
    "maximum": ("reads several tokens, but neither their sum nor their mean", SHARES),
    "weighted": ("reads several tokens, but neither their sum nor their mean", SHARES),
    "two_tokens": ("reads several tokens, but neither their sum nor their mean", SHARES),
    "squares": ("reads several tokens, but neither their sum nor their mean", SHARES),
    "token_logits": ("isn't one token's output of top", "mean"),
    "padding": ("reads padding tokens", "reads padding tokens"),
    "last_of_all": ("reads padding tokens", "reads padding tokens"),
    "without_gradients": ("can't be followed", "can't be followed"),
    "constant": ("can't be followed", "can't be followed"),
    "siamese": ("more than once", "more than once"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_other_heads_are_refused_by_name(kind):
    model = Refused(kind)
    batch = random_batch(model.encoder, batch=2, n=11, pads=[0, 4])
    relevance, rollout = REFUSALS[kind]
    with pytest.raises(ValueError, match=relevance):
        TransformerAttribution(model)(**batch, target=1)
    if rollout in (0, "mean"):
        targets = [0] if rollout == 0 else "mean"
        assert torch.equal(GlobEnc(model)(**batch).scores, GlobEnc(model)(**batch, targets=targets).scores)
        return
    with pytest.raises(ValueError, match=rollout):
        GlobEnc(model)(**batch)
    # targets that are named need no look at the head
    if kind != "siamese":
        expected = GlobEnc(model.encoder)(**batch, targets=[3]).scores
        assert torch.equal(GlobEnc(model)(**batch, targets=[3]).scores, expected)


@pytest.mark.parametrize(
    "pool, method",
    sweep(
        product(
            ("first", "last", "mean"), ("globenc", "attention-rollout", "transformer-attribution", "lrp")
        ),
        [
            *product(("mean",), ("globenc", "transformer-attribution", "lrp")),
            ("first", "attention-rollout"),
            ("last", "globenc"),
        ],
    ),
)
def test_explain_takes_modules_around_an_encoder(pool, method):
    model = Wrapped("bert", POOLS[pool])
    texts = ["the good film is deep, filming.", "a film"]
    alone = [pyglobenc.explain(model, tokenizer(), text, method=method) for text in texts]
    together = pyglobenc.explain(model, tokenizer(), texts, method=method, progress=False)
    for one, other in zip(alone, together, strict=True):
        batch = {"input_ids": torch.tensor([one.token_ids])}
        logits = model(**batch)[0].detach()
        assert one.probability == pytest.approx(float(logits.softmax(0).max()), rel=1e-9)
        if METHODS[method].target == "class":
            variant = RELEVANCE[method]
            result = TransformerAttribution(model)(**batch, variant=variant)
            assert one.target == int(logits.argmax()) == int(result.target)
            scores = result.scores[0]
        else:
            result = (GlobEnc(model) if method == "globenc" else Rollout(model, method))(**batch)
            kind, target = {"first": ("token", 0), "last": ("token", len(one) - 1), "mean": ("mean", 0)}[pool]
            assert (one.target_kind, one.target) == (kind, target)
            scores = result.scores[0, 0]
        assert relative(torch.tensor(one.scores), scores) <= 1e-12
        assert relative(torch.tensor(other.scores), scores) <= TOLERANCE and other.target == one.target


def test_explain_gives_a_module_the_inputs_that_it_takes():
    class Alone(Wrapped):
        def forward(self, input_ids):
            return super().forward(input_ids=input_ids)

    class Masked(Wrapped):
        def forward(self, input_ids, attention_mask, return_dict=None):
            assert return_dict is True
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    texts = ["the good film is deep, filming.", "a film"]
    expected = pyglobenc.explain(Wrapped("bert", mean), tokenizer(), texts, progress=False)
    for kind in (Alone, Masked):
        for one, other in zip(
            pyglobenc.explain(kind("bert", mean), tokenizer(), texts, progress=False), expected, strict=True
        ):
            assert (
                relative(torch.tensor(one.scores), torch.tensor(other.scores)) <= TOLERANCE
                and one.target_kind == "mean"
            )


@pytest.mark.parametrize("family, padding", [("GPT2", 0), ("Llama", 0), ("Llama", 3)])
def test_a_decoder_s_classifier_explains_the_token_that_it_reads(family, padding):
    """Also where a text ends in the token that pads, [SEP] of this tokenizer."""
    settings = {"GPT2": PRE_NORM["gpt2"][2], "Llama": DECODER}[family] | dict(pad_token_id=padding)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = randomize(getattr(transformers, f"{family}ForSequenceClassification")(config)).double().eval()
    for text in ("the good film", ["the good film is deep", "a film"]):
        found = pyglobenc.explain(model, tokenizer(), text, progress=False)
        for one in [found] if isinstance(text, str) else found:
            batch = {"input_ids": torch.tensor([one.token_ids])}
            read = len(one) - (2 if padding == 3 else 1)
            result = GlobEnc(model)(**batch)
            assert one.target == int(result.targets) == read
            assert torch.equal(result.scores, GlobEnc(model)(**batch, targets=[read]).scores)
            assert relative(torch.tensor(one.scores), result.scores[0, 0]) <= 1e-9


SUMMARIES = {"first": 0, "last": 10, "mean": None}


@pytest.mark.parametrize("kind", SUMMARIES)
def test_a_stock_head_with_another_summary(kind):
    config = transformers.ElectraConfig(
        **SMALL, embedding_size=32, summary_type=kind, summary_use_proj=True, summary_activation="gelu"
    )
    model = randomize(transformers.ElectraForMultipleChoice(config)).double().eval()
    batch = {name: t.unflatten(0, (2, 3)) for name, t in random_batch(model, batch=6, n=11).items()}
    result = TransformerAttribution(model)(**batch, target=[2, 0])
    head = [model.classifier, model.sequence_summary.summary]
    read = (
        {"weights": torch.full((11,), 1 / 11, dtype=torch.float64)}
        if kind == "mean"
        else {"position": SUMMARIES[kind]}
    )
    for b, choice in enumerate([2, 0]):
        one = {key: value[b : b + 1, choice : choice + 1] for key, value in batch.items()}
        scores, _ = direct(
            model, one, lambda out: out.logits[0, 0], [(head[0], head[0].weight.detach()), head[1]], **read
        )
        assert relative(result.scores[b], scores) <= TOLERANCE


@pytest.mark.parametrize(
    "variant", ["rollout", "last_layer", "last_layer_ablation", "second_layer", "full", "last_layer_attn"]
)
def test_variants_of_a_head_that_reads_the_mean(variant):
    """Padding changes nothing, and rows of the maps have equal shares."""
    model = Wrapped("bert", mean)
    ta, batch = TransformerAttribution(model), random_batch(model.encoder, batch=2, n=11, pads=[0, 4])
    together = ta(**batch, target=1, variant=variant).scores
    assert relative(together[1, :7], ta(**alone(batch, 1), target=1, variant=variant).scores[0]) <= TOLERANCE
    if "_" in variant:
        maps = ta(**alone(batch, 1), target=1, maps=["map", "alpha", "R_alpha"]).maps
        layer = 1 if variant.startswith("second") else -1
        matrix = {"last_layer_attn": maps["alpha"], "last_layer_ablation": None}.get(
            variant, maps["R_alpha"].clamp(min=0)
        )
        matrix = maps["map"][0, layer] if matrix is None else matrix[0, layer].mean(0)
        assert relative(together[1, :7], matrix.mean(0)) <= TOLERANCE


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "gpt2", "vit", "deberta-v3"])
def test_the_mean_of_all_rows(name):
    model = build(name, attention="eager" if name in EAGER_ALONE else "sdpa")
    batch = random_batch(model, batch=2, n=9, pads=[0, 3])
    for method in (GlobEnc(model), Rollout(model, "attention-rollout"), Rollout(model, "raw-attention")):
        result = method(**batch, targets="mean", layers=True)
        for b in range(2):
            n = int(batch["attention_mask"][b].sum()) if "attention_mask" in batch else 10
            rows = method(**alone(batch, b), targets=range(n), layers=True)
            exact = (rows.layer_scores * rows.layer_log_scale.exp()[..., None])[0].mean(1)
            assert not result.layer_scores[b, ..., n:].any()
            assert relative(result.layer_scores[b, :, 0, :n] * result.layer_log_scale[b].exp(), exact) <= 1e-9
        assert result.targets is None


def test_wrong_words_for_targets():
    model = build("bert")
    batch = random_batch(model, batch=1, n=6)
    with pytest.raises(ValueError, match="targets must be token positions or 'mean', got 'max'"):
        GlobEnc(model)(**batch, targets="max")
    with pytest.raises(ValueError, match="attention-flow starts from tokens"):
        Rollout(model, "attention-flow")(**batch, targets="mean")
    with pytest.raises(ValueError, match="target must be a class or its label"):
        pyglobenc.explain(build("bert-classifier"), tokenizer(), "film", "lrp", target="mean")


def test_the_head_costs_nothing_that_stays():
    """No hook, no flag, no graph; in every gradient mode, and where the encoder runs without gradients."""

    class Frozen(Wrapped):
        def states(self, **inputs):
            with torch.no_grad():
                return super().states(**inputs)

    model = Frozen("bert", mean)
    batch = random_batch(model.encoder, batch=2, n=11, pads=[0, 4])
    expected = [
        GlobEnc(Wrapped("bert", mean))(**batch).scores,
        TransformerAttribution(Wrapped("bert", mean))(**batch).scores,
    ]
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            given = {name: t.clone() for name, t in batch.items()}
            found = GlobEnc(model)(**given, layers=True), TransformerAttribution(model)(**given)
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
        for result, scores in zip(found, expected, strict=True):
            assert relative(result.scores, scores) <= 1e-12
            assert not result.scores.requires_grad and not result.output.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", [None, "globenc"])
@pytest.mark.parametrize("pool", ["first", "mean"])
def test_images_of_modules_around_an_encoder(pool, method):
    model = Wrapped("vit", POOLS[pool])
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    found = pyglobenc.explain_image(model, None, pixels, method=method)
    # the rollout family explains what the head reads
    result = (TransformerAttribution if method is None else GlobEnc)(model)(pixel_values=pixels)
    for b, one in enumerate(found):
        ((target, scores),) = one.scores.items()
        row = result.scores[b] if method is None else result.scores[b, 0, -9:]
        assert relative(torch.tensor(scores).flatten(), row) <= 1e-12
        assert target == (int(result.target[b]) if method is None else {"first": 0, "mean": "mean"}[pool])
        assert one.predicted == int(model(pixel_values=pixels)[b].argmax())


def test_transformers_own_heads_that_read_something_else_keep_the_documented_target():
    """BEiT's reads the mean of the patches, DINOv2's joins [CLS] and that mean; of a user's module each is
    followed or refused.
    """

    class Around(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values=pixel_values)

    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    for name, settings in (("Beit", dict(use_relative_position_bias=True)), ("Dinov2", dict(mlp_ratio=2))):
        config = getattr(transformers, f"{name}Config")(**IMAGE, **settings)
        model = randomize(getattr(transformers, f"{name}ForImageClassification")(config)).double().eval()
        result = GlobEnc(model)(pixel_values=pixels)
        assert not result.targets.any() and torch.equal(
            result.scores, GlobEnc(model)(pixel_values=pixels, targets=[0]).scores
        )
        around = GlobEnc(Around(model).eval())
        if name == "Dinov2":
            with pytest.raises(ValueError, match=SHARES):
                around(pixel_values=pixels)
            continue
        result, rows = around(pixel_values=pixels), around(pixel_values=pixels, targets=range(1, 10))
        exact = (rows.scores * rows.log_scale.exp()[..., None]).mean(1)
        assert (
            result.targets is None and relative(result.scores[:, 0] * result.log_scale.exp(), exact) <= 1e-9
        )


def test_a_head_whose_gradient_vanishes():
    model = build("bert-classifier")
    batch = random_batch(model, batch=1, n=6)
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert torch.equal(GlobEnc(model)(**batch).scores, GlobEnc(model)(**batch, targets=[0]).scores)
    model = Wrapped("bert", first, act=nn.ReLU())
    with torch.no_grad():
        model.hidden[0].bias.fill_(-100)
    with pytest.raises(ValueError, match="don't depend on the text for this input"):
        GlobEnc(model)(**batch)


@pytest.mark.parametrize(
    "pool, name",
    sweep(
        product(("first", "last", "mean"), ("llama", "gpt2", "modernbert", "deberta-v3", "albert", "mpnet")),
        [
            *(("mean", name) for name in ("gpt2", "modernbert", "deberta-v3", "albert")),
            ("last", "llama"),
            ("first", "mpnet"),
        ],
    ),
)
def test_rows_of_other_architectures(pool, name):
    """GlobEnc follows any head, through a last norm too; that norm is no part of a layer."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            model = build(name, attention="eager" if name in EAGER_ALONE else "sdpa")
            self.encoder, self.top = model.base_model, nn.Linear(48, CLASSES).double()

        def forward(self, input_ids, attention_mask):
            return self.top(
                POOLS[pool](
                    self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0], attention_mask
                )
            )

    model = Around().eval()
    batch = random_batch(model.encoder, batch=2, n=9, pads=[0, 4])
    targets = {"first": [0], "last": torch.tensor([[8], [4]]), "mean": "mean"}[pool]
    for method in (GlobEnc(model), Rollout(model, "w-res")):
        found, expected = method(**batch, layers=True), method(**batch, targets=targets, layers=True)
        assert relative(found.layer_scores, expected.layer_scores) <= 1e-12
        assert (found.targets is None) == (pool == "mean")


MODES = ("bfloat16", "float16", "float32", "autocast", "float32-head", "widened")


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize(
    "pool, mode",
    sweep(product(("first", "mean"), MODES), list(zip(("first", "mean") * 3, MODES, strict=True))),
)
def test_heads_in_every_precision(pool, mode):
    """Rounding neither hides a head that has no rule, nor makes one of a head that has."""

    class Around(Refused):
        def states(self, **inputs):
            return self.encoder(**inputs).last_hidden_state.to(self.top.weight.dtype)

        def forward(self, **inputs):
            return Wrapped.forward(self, **inputs) if self.kind in POOLS else super().forward(**inputs)

    def cast(model):
        model.to({"bfloat16": torch.bfloat16, "float16": torch.float16}.get(mode, torch.float32))
        if mode == "float32-head":
            model.encoder.bfloat16()
        return model

    model = cast(Around(pool))
    model.pool = POOLS[pool]
    batch = random_batch(model.encoder, batch=2, n=11, pads=[0, 4])
    dtype = torch.float64 if mode == "widened" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        result = TransformerAttribution(model, dtype=dtype)(**batch, target=1)
        assert result.position is None if pool == "mean" else not result.position.any()
        assert (GlobEnc(model, dtype=dtype)(**batch).targets is None) == (pool == "mean")
        if mode == "float32-head":
            return
        for kind in ("attention", "gated", "mixed_features", "weighted", "maximum"):
            with pytest.raises(ValueError, match="no relevance rule"):
                TransformerAttribution(cast(Around(kind)), dtype=dtype)(**batch, target=1)
