r"""Short LaTeX labels (`\lg(R_\mathrm{cut}/V)`, `f_\mathrm{He}`) as HTML: letters in italics, sub, sup and Greek.

The report shows symbols without scripts or requests. Labels use a few commands; an unknown command is shown by its name, and no input
raises an error. MathML by the library latex2mathml is not used: it sets one-letter units such as \mathrm{V} in italics, omits the space
after \lg and raises an error for incomplete input.
"""

# ruff: noqa: RUF001  (Greek letters and signs that look like Latin ones are what this module is about)
from html import escape

__all__ = ["latex_to_html"]

_GREEK = dict(
    alpha="α",
    beta="β",
    gamma="γ",
    delta="δ",
    epsilon="ϵ",
    varepsilon="ε",
    zeta="ζ",
    eta="η",
    theta="θ",
    vartheta="ϑ",
    iota="ι",
    kappa="κ",
    mu="μ",
    nu="ν",
    xi="ξ",
    pi="π",
    rho="ρ",
    sigma="σ",
    tau="τ",
    upsilon="υ",
    phi="ϕ",
    varphi="φ",
    chi="χ",
    psi="ψ",
    omega="ω",
    ell="ℓ",
) | {"lambda": "λ"}
_UPRIGHT = {"Gamma": "Γ", "Delta": "Δ", "Theta": "Θ", "Lambda": "Λ", "Xi": "Ξ", "Pi": "Π", "Sigma": "Σ", "Phi": "Φ", "Psi": "Ψ"}
_UPRIGHT |= {"Omega": "Ω", "langle": "⟨", "rangle": "⟩", "infty": "∞", "odot": "☉", "circ": "°", "partial": "∂", "nabla": "∇"}
_UPRIGHT |= {"prime": "′", "ldots": "…", "dots": "…", "cdot": "·", "mid": "|", "vert": "|", "hbar": "ħ", "degree": "°"}
_SPACED = {"times": "×", "pm": "±", "leq": "≤", "le": "≤", "geq": "≥", "ge": "≥", "sim": "∼", "approx": "≈", "propto": "∝"}
_SPACED |= {"to": "→", "rightarrow": "→", "neq": "≠", "in": "∈", "ll": "≪", "gg": "≫"}
_UPRIGHT |= {key: f"\u2009{sign}\u2009" for key, sign in _SPACED.items()}
_FUNCTIONS = ("lg", "ln", "log", "exp", "sin", "cos", "tan", "max", "min")
_SPACES = {",": "\u2009", ":": "\u2009", ";": "\u2005", " ": " ", "!": "", "quad": "\u2003", "left": "", "right": "", "displaystyle": ""}
_ROMAN = ("mathrm", "text", "textrm", "operatorname", "rm", "mathsf")
_ACCENTS = {"hat": "\u0302", "bar": "\u0304", "overline": "\u0304", "tilde": "\u0303", "vec": "\u20d7", "dot": "\u0307"}


def latex_to_html(latex: str) -> str:
    r"""HTML of a LaTeX fragment without dollar signs, safe to put into a page as it is.

    Example: `f_\mathrm{He}` -> `<i>f</i><sub>He</sub>`. Unknown commands show their name; unbalanced braces are closed.
    """
    return _Reader(latex).sequence(italic=True, inner=False)


class _Reader:
    """Recursive-descent parser; each branch consumes at least one character, so that it terminates for any input."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def sequence(self, *, italic: bool, inner: bool) -> str:
        """HTML of the text up to the closing brace (inner) or the end."""
        out: list[str] = []
        while self.at < len(self.text):
            if self.text[self.at] == "}":
                self.at += 1
                if inner:
                    break
                continue
            out.append(self.atom(italic=italic))
        return "".join(out)

    def atom(self, *, italic: bool) -> str:
        """One character, group, script or command."""
        if self.at >= len(self.text):
            return ""
        char = self.text[self.at]
        self.at += 1
        if char == "{":
            return self.group(italic)
        if char in "_^":
            tag = "sub" if char == "_" else "sup"
            return f"<{tag}>{self.argument(italic)}</{tag}>"
        if char == "\\":
            return self.command(italic)
        if char == "-":
            return "−"
        if char == "~":
            return "\u00a0"
        if char == " " and italic:
            return ""
        return f"<i>{escape(char)}</i>" if italic and char.isalpha() else escape(char)

    def group(self, italic: bool) -> str:
        """HTML of the text in braces; the depth of nesting is limited to 50, so that no input exhausts the stack."""
        if self.depth > 50:
            return ""
        self.depth += 1
        out = self.sequence(italic=italic, inner=True)
        self.depth -= 1
        return out

    def argument(self, italic: bool) -> str:
        """HTML of the next group or atom, after blanks."""
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1
        if self.at < len(self.text) and self.text[self.at] not in "}":
            if self.depth > 50:
                self.at += 1
                return ""
            self.depth += 1
            out = self.atom(italic=italic)
            self.depth -= 1
            return out
        return ""

    def command(self, italic: bool) -> str:
        """HTML of the command after a backslash."""
        start = self.at
        while self.at < len(self.text) and self.text[self.at].isalpha():
            self.at += 1
        if self.at == start:  # an escaped sign such as \, or \%
            sign = self.text[self.at : self.at + 1]
            self.at += 1
            return _SPACES.get(sign, escape(sign))
        name = self.text[start : self.at]
        if name in _GREEK:
            return f"<i>{_GREEK[name]}</i>" if italic else _GREEK[name]
        if name in _ROMAN:
            return self.argument(False)
        if name in _ACCENTS:
            return self.argument(italic).replace("</i>", _ACCENTS[name] + "</i>", 1)
        if name == "sqrt":
            return f"√({self.argument(italic)})"
        if name == "frac":
            return f"{self.argument(italic)}/{self.argument(italic)}"
        if name in _FUNCTIONS:
            return f"{name}\u2009"
        return _UPRIGHT.get(name, _SPACES.get(name, escape(name)))
