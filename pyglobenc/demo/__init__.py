"""The web page of `pyglobenc demo`, made with Gradio."""
