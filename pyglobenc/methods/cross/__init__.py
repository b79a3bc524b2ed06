"""Attribution in models of two streams of tokens (Chefer, Gur and Wolf, ICCV 2021)."""
