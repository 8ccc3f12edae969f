"""What went wrong in a chat template, which is a program in Jinja that a model's publisher wrote."""

from traceback import extract_tb


def describe_template_error(error: Exception) -> str:
    """Return what a chat template's error says, with the template's line where it is at fault."""
    said = " ".join(str(getattr(error, "message", None) or error).split()) or type(error).__name__
    if type(error).__name__ == "TemplateError":  # the template's own words: raise_exception
        return said
    # of any other error while it runs, Jinja puts the template's lines into the traceback
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    return said if line is None else f"line {line}, {said}"


def is_broken_template(error: BaseException | None) -> bool:
    """Return whether a template is no Jinja at all, whatever conversation it is given."""
    from jinja2 import TemplateSyntaxError  # it costs 80 ms

    return isinstance(error, TemplateSyntaxError)
