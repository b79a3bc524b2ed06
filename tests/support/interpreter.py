"""Makes Triton's interpreter about twice as fast, without a change of what it computes."""

from functools import cache

import numpy as np


def hasten() -> None:
    """Replace two helpers of the interpreter that repeat their work; a release without them is left alone."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch, scope, dtype_of = (
            interpreter._patch_lang,
            interpreter._LangPatchScope,
            cache(interpreter._get_np_dtype),
        )
    except (ImportError, AttributeError):
        return

    @cache
    def languages(fn) -> list:
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def patch_once(fn):
        # At every call between jit functions the interpreter looks through the whole language, although the
        # launch has already replaced everything there.
        return patch(fn) if any(tl.core.is_builtin(lang.load) for lang in languages(fn)) else scope()

    def np_dtype(dtype):
        # The original builds a table of all types at every call.
        scalar = dtype.scalar
        return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else dtype_of(scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype
