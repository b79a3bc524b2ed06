"""The page of `pyglobenc demo` as a Hugging Face Space. It loads no other models than these."""

from pyglobenc.demo.models import Models
from pyglobenc.demo.page import LAUNCH, build

TEXTS = ("textattack/bert-base-uncased-SST-2", "sentence-transformers/all-MiniLM-L6-v2")
IMAGES = ("google/vit-base-patch16-224",)

demo = build(Models(TEXTS, IMAGES, public=True))

if __name__ == "__main__":
    demo.launch(**LAUNCH)
