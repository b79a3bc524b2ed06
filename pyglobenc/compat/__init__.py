"""Drop-in modules for scripts written on the published code: the same names, arguments and results, on stock
transformers models.
"""

from pyglobenc.compat.tokenizers import add_encode_plus

# the scripts take their tokenizers from transformers, so the method has to be there
add_encode_plus()
