"""The page of the Space: a text and what a model paid for it, in bits per byte."""

from pathlib import Path

import evaluate


def score(text: str, nats: str) -> str:
    """Bits per byte in words, or what is wrong with the input.

    Example:
        >>> score("text", "1 1 0.5")
        '0.9017 bits per byte over 4 bytes'
    """
    try:
        values = [float(value) for value in nats.replace(",", " ").split()]
    except ValueError:
        return f"got {nats!r}: expected numbers, the negative log likelihood of the text in nats, total or by token."
    try:
        result = _metric().compute(predictions=[values], references=[text])
    except ValueError as error:
        return str(error)
    return f"{result['bits_per_byte']:.4f} bits per byte over {result['bytes']} bytes"


def _metric():
    return evaluate.load(str(Path(__file__).with_name("bits_per_byte.py")))


def main() -> None:
    """Serve the page."""
    import gradio as gr

    gr.Interface(
        fn=score,
        inputs=[gr.Textbox(label="Text"), gr.Textbox(label="Negative log likelihood in nats, total or by token")],
        outputs=gr.Textbox(label="Result"),
        title="Bits per byte",
        description=_metric().description,
        examples=[["to be or not to be", "30.4"]],
    ).launch()


if __name__ == "__main__":
    main()
