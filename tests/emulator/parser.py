"""PTX text -> Program."""

import bisect
import functools
import itertools
import re

from tests.emulator.errors import ParseError, Unsupported
from tests.emulator.program import BRANCHING, Function, Instruction, Program, Scope, Variable
from tests.emulator.ptx_types import SPECIAL_REGISTER, TYPES

TOKEN = re.compile(
    r'(?P<ws>\s+|//[^\n]*|/\*.*?\*/)|(?P<str>"(?:[^"\\]|\\.)*")|'
    r"(?P<num>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+\.\d+(?:[eE][-+]?\d+)?|\d+U?)|"
    r"(?P<word>[A-Za-z_$%.][\w$.]*(?:::[\w.]+)*)|(?P<punct>[][{}()<>,;:@!|+\-=*])",
    re.S,
)
DIRECTIVE_LINE = re.compile(r"(?m)^[ \t]*\.(loc|file|version|address_size)\b[^\n]*$")
SPACES = (".global", ".const", ".shared", ".local", ".param")


@functools.lru_cache(maxsize=256)
def parse(ptx):
    """The Program of a PTX text; each text is parsed once per process."""
    program = Program()
    Parser(ptx, program)
    program.finish()
    return program


class Parser:
    """Recursive descent over the tokens of one PTX text, filling a Program."""

    def __init__(self, text, program):
        self.program, self.text = program, DIRECTIVE_LINE.sub("", text)
        self.tokens, self.positions = [], []
        self._scan()
        self.at, self.unique = 0, itertools.count()
        self.line_starts = [match.start() for match in re.finditer("\n", self.text)]
        self.scope = self.top = Scope()
        self.linkage, self.used_bytes = "", None
        while self.at < len(self.tokens):
            self._module_item()

    # ---- tokens
    def _scan(self):
        at, text = 0, self.text
        while at < len(text):
            match = TOKEN.match(text, at)
            if not match:
                line = text.count("\n", 0, at) + 1
                raise ParseError(f"line {line}: cannot read {text[at : at + 30]!r}")
            at = match.end()
            if match.lastgroup == "ws":
                continue
            word = match.group()
            for part in re.findall(r"\.[^.]+", word) if word[0] == "." else (word,):  # .reg.b32 is two words
                self.tokens.append((match.lastgroup, part))
                self.positions.append(match.start())

    def _peek(self, ahead=0):
        return self.tokens[self.at + ahead][1] if self.at + ahead < len(self.tokens) else ""

    def _next(self):
        self.at += 1
        return self.tokens[self.at - 1][1]

    def _accept(self, token):
        if self._peek() != token:
            return False
        self.at += 1
        return True

    def _expect(self, token):
        if self._next() != token:
            raise self._error(f"expected {token!r}, found {self._peek(-1)!r}")

    def _skip_past(self, token):
        while self._next() != token:
            pass

    def _line(self):
        return bisect.bisect(self.line_starts, self.positions[min(self.at, len(self.positions) - 1)]) + 1

    def _error(self, what):
        return ParseError(f"line {self._line()}: {what}")

    # ---- the module
    def _module_item(self):
        token = self._next()
        if token == ";":
            return
        if token in (".visible", ".extern", ".weak", ".common"):
            self.linkage = token
            self._module_item()
            return
        if token == ".target":
            self.program.target = self._next()
            while self._accept(","):
                self._next()
        elif token in (".global", ".const", ".shared"):
            self._variable(token[1:], "")
        elif token in (".func", ".entry"):
            self._function(token == ".entry")
        elif token == ".section":
            self._skip_past("{")
            self._skip_past("}")
        elif token in (".pragma", ".alias"):
            self._skip_past(";")
        else:
            raise self._error(f"unknown directive {token}")
        self.linkage = ""

    def _number(self):
        negative = self._accept("-")
        kind, text = self.tokens[self.at]
        self.at += 1
        if kind != "num":
            raise self._error(f"number expected, found {text!r}")
        if text[:2] in ("0f", "0F", "0d", "0D"):
            return (text[1].lower(), int(text[2:], 16))
        if "." in text:
            value = float(text)
        else:
            digits = text.rstrip("U")
            value = int(digits, 8) if digits[0] == "0" and digits.isdigit() else int(digits, 0)
        return -value if negative else value

    def _variable(self, space, function):
        """.space [.align n] [.v2] .type name[n] [= init], ... ;"""
        align, vector = None, 1
        while self._peek()[0] == ".":
            token = self._next()
            if token == ".align":
                align = int(self._next())
            elif token in (".v2", ".v4"):
                vector = int(token[2:])
            elif token[1:] in TYPES:
                ptx_type = TYPES[token[1:]]
            elif token != ".ptr" and token not in SPACES:
                raise self._error(f"{token} in a declaration")
        width = max(ptx_type.bits // 8, 1)
        while True:
            names, count, init = self._declared_names(), 1, None
            while self._accept("["):
                if self._accept("]"):
                    count = 0
                else:
                    count *= self._number()
                    self._expect("]")
            if self._accept("="):
                init = (ptx_type, self._initialiser())
            for name in names:
                key = f"{function}:{next(self.unique)}:{name}" if function else name
                variable = Variable(key, space, align or width * vector, count * vector * width, init, function)
                self.program.variables[key] = variable
                self.scope.names[name] = ("sym", key, 0)
            if not function and self.linkage == ".extern" and count == 0 and space == "shared":
                self.program.dynamic_shared.add(key)
            if space == "param" and self._peek() in (",", ")"):
                return variable
            if self._next() == ";":
                return variable

    def _declared_names(self):
        """name, or name<n> for name0 ... name(n-1)"""
        name = self._next()
        if not self._accept("<"):
            return [name]
        count = int(self._next())
        self._expect(">")
        return [f"{name}{k}" for k in range(count)]

    def _initialiser(self):
        if self._accept("{"):
            values = []
            while not self._accept("}"):
                values += self._initialiser()
                self._accept(",")
            return values
        if self.tokens[self.at][0] == "word":
            name = self._next()
            if name == "generic" and self._accept("("):
                name = self._next()
                self._expect(")")
            return [("sym", name, self._number() if self._accept("+") else 0)]
        return [self._number()]

    def _parameters(self, function):
        params = []
        self._expect("(")
        while not self._accept(")"):
            if self._accept(","):
                continue
            token = self._next()
            if token != ".param":
                raise Unsupported(f"{token} function parameters (only .param)")
            self.linkage = ""
            params.append(self._variable("param", function))
        return params

    def _function(self, is_entry):
        program = self.program
        self.scope = Scope(self.top)
        results = self._parameters("?") if self._peek() == "(" else []
        name = self._next()
        function = Function(name, is_entry)
        function.results = [Variable(f"{name}:{v.key}", *v[1:5], name) for v in results]
        for variable in function.results:
            program.variables[variable.key] = variable
        for local, target in list(self.scope.names.items()):
            self.scope.names[local] = ("sym", f"{name}:{target[1]}", 0)
        if self._peek() == "(":
            function.params = self._parameters(name)
        while self._peek() not in (";", "{"):
            token = self._next()
            if token[0] == ".":
                values = function.attributes.setdefault(token, [])
            elif token != ",":
                values.append(int(token, 0))
        if self._next() == "{":
            function.start = len(program.code)
            self._body(name)
            program.code.append(Instruction("ret", [], name, self.scope))
            function.end = len(program.code)
            program.leaders.add(function.start)
            program.functions[name] = function
            if is_entry:
                program.entries.append(name)
        else:
            program.functions.setdefault(name, function)
        self.scope = self.top

    # ---- function bodies
    def _body(self, function):
        program = self.program
        while True:
            kind, token = self.tokens[self.at]
            if token == "}":
                self.at += 1
                return
            if token == "{":
                self.at += 1
                self.scope = Scope(self.scope)
                self._body(function)
                self.scope = self.scope.parent
            elif token == ";":
                self.at += 1
            elif token == ".reg":
                self.at += 1
                self._registers(function)
            elif token in SPACES:
                self.at += 1
                self._variable(token[1:], function)
            elif token == ".pragma":
                words = self._peek(1).strip('"').split()
                self.used_bytes = int(words[1], 16) if words and words[0] == "used_bytes_mask" else None
                self._skip_past(";")
            elif kind == "word" and self._peek(1) == ":":
                self.at += 2
                self._label(token, program)
            else:
                self._statement(function)

    def _label(self, name, program):
        if self._peek() in (".branchtargets", ".calltargets"):
            self.at += 1
            targets = []
            while not self._accept(";"):
                if not self._accept(","):
                    targets.append(self._next())
            self.scope.tables[name] = targets
        elif self._peek() == ".callprototype":
            self._skip_past(";")
        else:
            self.scope.labels[name] = len(program.code)
            program.leaders.add(len(program.code))

    def _registers(self, function):
        ptx_type = TYPES[self._next()[1:]]
        while True:
            names, unique = self._declared_names(), next(self.unique)
            for name in names:
                key = f"{function}:{unique}:{name}"
                self.program.registers[key] = ptx_type.bits
                self.scope.names[name] = ("reg", key)
            if self._next() == ";":
                return

    def _statement(self, function):
        start, line, guard, negated = self.positions[self.at], self._line(), None, False
        if self._accept("@"):
            negated = self._accept("!")
            guard = self._word(self._next())
        op, args = self._next(), []
        while self._peek() != ";":
            args.append(self._operand())
            if self._peek() != ";":
                self._expect(",")
        text = " ".join(self.text[start : self.positions[self.at]].split())
        self.at += 1
        ins = Instruction(op, args, function, self.scope)
        ins.guard, ins.negated, ins.line = guard, negated, line
        ins.text = text if len(text) < 160 else f"{text[:80]}...{text[-70:]}"
        # .pragma "used_bytes_mask": the other bytes of this load may be anything
        ins.used_bytes, self.used_bytes = self.used_bytes, None
        code, leaders = self.program.code, self.program.leaders
        code.append(ins)
        if ins.base in BRANCHING:
            leaders.add(len(code))
        if ins.base == "call":  # lanes come back to a second half that fetches the results
            back = Instruction("callret", args, function, self.scope)
            back.line, back.text = line, text
            code.append(back)
            leaders.add(len(code))

    def _word(self, name):
        if name == "_":
            return ("sink",)
        if SPECIAL_REGISTER.match(name):
            return ("special", name)
        return self.scope.find("names", name) or ("name", name, 0)

    def _operand(self):
        token = self._peek()
        if token == "!":
            self.at += 1
            return ("not", self._operand())
        if token == "[":
            return self._memory_operand()
        if token in ("{", "("):
            self.at += 1
            close = "}" if token == "{" else ")"
            parts = []
            while not self._accept(close):
                if not self._accept(","):
                    parts.append(self._operand())
            return ("vec", parts)
        if token == "-" or self.tokens[self.at][0] == "num":
            return ("imm", self._number())
        word = self._word(self._next())
        if word[0] in ("sym", "name"):
            while self._peek() in ("+", "-") and self.tokens[self.at + 1][0] == "num":
                sign = 1 if self._next() == "+" else -1
                word = (word[0], word[1], word[2] + sign * self._number())
        if self._accept("|"):
            return ("pair", word, self._operand())
        return word

    def _memory_operand(self):
        """[base + offset]"""
        self.at += 1
        base = self._operand()
        offset = 0
        if base[0] in ("sym", "name"):
            base, offset = (base[0], base[1], 0), base[2]
        while not self._accept("]"):
            sign = self._next()
            if sign not in ("+", "-"):
                raise Unsupported(f"line {self._line()}: {sign!r} in an address")
            offset += self._number() if sign == "+" else -self._number()
        return ("mem", base, offset)
