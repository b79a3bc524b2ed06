"""Every code block of the documentation runs, its commands parse, and the site builds without a warning."""

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
import two_streams
from code_blocks import blocks
from models import build, random_batch
from PIL import Image
from tiny import VOCABULARY, classifier, tokenizer
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    CLIPImageProcessor,
    CLIPProcessor,
    ViTImageProcessor,
)

from pyglobenc.cli.main import _parser
from pyglobenc.viz import evaluation

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What torchrun tells the only rank of a machine.
RANK = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
TEXTS = ["A deep film.", "Not good at all."]


def tagger(config) -> BertForTokenClassification:
    """Return a token classifier with three labels, where the classifier of texts has two."""
    three = type(config)(**config.to_dict())
    three.num_labels = 3
    return BertForTokenClassification(three).double().eval()


def names(page: str) -> dict:
    """Return what the blocks of a page take for granted: small models and inputs for them."""
    model, words = classifier(), tokenizer()
    config = model.config
    batch = words(TEXTS, padding=True, return_tensors="pt")
    given = dict(
        model=model,
        tokenizer=words,
        texts=TEXTS,
        batch=batch,
        input_ids=batch["input_ids"][:1],
        tagger=tagger(config),
        reader=BertForQuestionAnswering(config).double().eval(),
        vision_model=build("vit", num_labels=3),
        processor=ViTImageProcessor(size=dict(height=12, width=12)),
        image=Image.new("RGB", (20, 20), "white"),
    )
    if page == "generation.md":
        template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
        writer = build("llama", vocab_size=len(VOCABULARY))
        given |= dict(model=writer, tokenizer=tokenizer(chat_template=template))
    if page == "embeddings.md":
        given |= dict(model=build("bert"), reranker=build("bert-classifier", num_labels=1))
    if page == "information_flow.md":
        decoder = build("llama", max_position_embeddings=140)
        given |= dict(model=decoder, batch=random_batch(decoder, batch=1, n=130))
    if page == "cross_attention.md":
        pixels = CLIPImageProcessor(size=dict(height=12, width=12), crop_size=dict(height=12, width=12))
        given |= dict(model=two_streams.build("t5", vocab_size=len(VOCABULARY)), clip=two_streams.clip())
        given |= dict(source=TEXTS[0], text=TEXTS[1], ids=torch.tensor([[0, 7, 8]]), token_id=9)
        given |= dict(processor=CLIPProcessor(pixels, words))
    return given


def leave_the_group() -> None:
    """Undo what the page on several ranks does."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def drawn_once(draw):
    """Return draw(rows), which draws a table once: a chart of all methods and metrics takes seconds."""
    pictures = {}

    def draw_or_keep(rows):
        if id(rows) not in pictures:
            pictures[id(rows)] = draw(rows)
        return pictures[id(rows)]

    return draw_or_keep


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "page",
    # tests/methods/test_add_a_method.py runs the blocks of the page on methods as a module.
    [page for page in PAGES if blocks(page, "python") and page.name != "add_a_method.md"],
    ids=lambda p: p.name,
)
def test_code_blocks_run(page, monkeypatch, tmp_path, request):
    given = names(page.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "png", drawn_once(evaluation.png))
    for kind, thing in (("AutoModelForSequenceClassification", "model"), ("AutoTokenizer", "tokenizer")):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda name, t=thing: given[t])
    exec("import pyglobenc", given)
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    request.addfinalizer(leave_the_group)
    for code in blocks(page, "python"):
        if "cuda" in code and "is_available" not in code and not torch.cuda.is_available():
            continue
        exec(compile(code, f"{page.name}: {code[:40]!r}", "exec"), given)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page):
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["pyglobenc"]:
            _parser().parse_args(words[1:])
        elif words[:1] in (["python"], ["python3"]) and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "functions" / "index.html").read_text(encoding="utf-8")
    assert "max_length" in reference
