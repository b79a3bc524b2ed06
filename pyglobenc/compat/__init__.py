"""Drop-in modules for scripts that use the published code.

They have the same names, arguments and results, and work on stock transformers models.
"""

from pyglobenc.compat.tokenizers import add_encode_plus

# The published scripts call `encode_plus` on tokenizers that they load from transformers.
add_encode_plus()
