//! The tokens of a source text. Comments, strings and characters are no tokens, so that a path in them is no arrow.

/// A name, `::`, or one other character of code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Token<'a> {
    pub(crate) text: &'a str,
    pub(crate) line: usize,
}

impl Token<'_> {
    pub(crate) fn is_name(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

pub(crate) fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut found = Vec::new();
    let (mut rest, mut line) = (text, 1);
    while !rest.is_empty() {
        let (length, is_code) = first_piece(rest);
        let (piece, after) = rest.split_at(length);
        if is_code {
            found.push(Token { text: piece, line });
        }
        line += piece.matches('\n').count();
        rest = after;
    }
    found
}

/// The length of the first piece of `text`, and whether it is a token.
fn first_piece(text: &str) -> (usize, bool) {
    let first = text.chars().next().expect("the text is not empty");
    if let Some(length) = comment(text).or_else(|| string(text)).or_else(|| quote(text)) {
        return (length, false);
    }
    match first {
        'r' if text.starts_with("r#") => (2, false),
        _ if first.is_alphabetic() || first == '_' => (name(text), true),
        '0'..='9' => (name(text), false),
        ':' if text.starts_with("::") => (2, true),
        _ => (first.len_utf8(), !first.is_whitespace()),
    }
}

fn name(text: &str) -> usize {
    text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())
}

fn comment(text: &str) -> Option<usize> {
    if text.starts_with("//") {
        return Some(text.find('\n').unwrap_or(text.len()));
    }
    text.starts_with("/*").then(|| block_comment(text))
}

/// Block comments nest.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

/// A string of any kind: `"…"`, `b"…"`, `c"…"`, `r#"…"#`.
fn string(text: &str) -> Option<usize> {
    let opening = text.strip_prefix(['b', 'c']).unwrap_or(text);
    let Some(raw) = opening.strip_prefix('r') else {
        let body = opening.strip_prefix('"')?;
        return Some(text.len() - body.len() + escaped(body, '"'));
    };
    let hashes = raw.len() - raw.trim_start_matches('#').len();
    let body = raw[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = body.find(&end).map_or(body.len(), |at| at + end.len());
    Some(text.len() - body.len() + length)
}

/// A character, or the name of a lifetime.
fn quote(text: &str) -> Option<usize> {
    let body = text.strip_prefix("b'").or_else(|| text.strip_prefix('\''))?;
    let before = text.len() - body.len();
    let first = body.chars().next()?;
    if first == '\\' || body[first.len_utf8()..].starts_with('\'') {
        return Some(before + escaped(body, '\''));
    }
    Some(before + name(body))
}

/// The length up to and with the quote `end` that no backslash escapes.
fn escaped(body: &str, end: char) -> usize {
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            _ if c == end => return at + 1,
            _ => {}
        }
    }
    body.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<&str> {
        tokens(text).iter().map(|token| token.text).collect()
    }

    #[test]
    fn comments_strings_characters_and_lifetimes_are_no_tokens() {
        assert_eq!(texts("a // crate::b\n/* c /* d */ e */ f"), ["a", "f"]);
        assert_eq!(texts(r##"a "b \" c" r#"d " e"# b"f" c"g" h"##), ["a", "h"]);
        assert_eq!(texts(r"a 'b' '\'' b'c' '\u{7}' &'d e"), ["a", "&", "e"]);
        assert_eq!(texts("r#type 0x1f_u8..7"), ["type", ".", "."]);
    }

    #[test]
    fn a_token_has_its_line() {
        let line = tokens("a\n/* \n */ \"\n\" b").last().map(|token| token.line);
        assert_eq!(line, Some(4));
    }
}
