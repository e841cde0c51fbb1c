//! The two rules: arrows between rooms go one way, and no files of a crate form a circle.

use crate::arrows::Arrow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The rooms of the library in the order of its arrows. Those that share a place do not refer to each other.
pub(crate) const ROOMS: &[&[&str]] = &[
    &["api"],
    &["serve"],
    &["fault"],
    &["reclaim"],
    &["space"],
    &["policy", "source", "metrics"],
    &["error"],
    &["guard"],
    &["signals", "method", "retry"],
];

fn rank(room: &str) -> Option<usize> {
    ROOMS.iter().position(|rooms| rooms.contains(&room))
}

/// The room of a file, unless the file is the root of the crate.
fn room(file: &str) -> Option<&str> {
    let name = file.split('/').next()?;
    Some(name.strip_suffix(".rs").unwrap_or(name)).filter(|name| *name != "lib")
}

/// A line for each arrow that goes back, or sideways, or to a room that is not in `ROOMS`.
pub(crate) fn wrong_arrows(arrows: &[Arrow]) -> Vec<String> {
    arrows.iter().filter_map(wrong_arrow).collect()
}

fn wrong_arrow(arrow: &Arrow) -> Option<String> {
    let from = room(&arrow.from)?;
    let to = arrow.rooms.iter().find(|to| *to != from && (rank(from).is_none() || rank(to) <= rank(from)))?;
    let order: Vec<_> = ROOMS.iter().map(|rooms| rooms.join("|")).collect();
    let manner = match (rank(to), rank(from)) {
        (None, _) | (_, None) => "has no order",
        (to, from) if to == from => "goes sideways",
        _ => "runs back",
    };
    Some(format!(
        "{}:{}: `{}` (defined in {}): the arrow from {from} to {to} {manner}; the order is {}",
        arrow.from,
        arrow.line,
        arrow.path,
        arrow.to,
        order.join(" -> ")
    ))
}

/// Each circle of files: the files that reach each other.
pub(crate) fn circles(arrows: &[Arrow]) -> Vec<Vec<&str>> {
    let mut next: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for arrow in arrows.iter().filter(|arrow| arrow.from != arrow.to) {
        next.entry(&arrow.from).or_default().insert(&arrow.to);
    }
    let reached: BTreeMap<&str, BTreeSet<&str>> =
        next.keys().map(|from| (*from, reach(&next, from))).collect();
    let mut found: BTreeSet<Vec<&str>> = BTreeSet::new();
    for (from, to) in &reached {
        let circle: Vec<_> = to
            .iter()
            .filter(|file| reached.get(*file).is_some_and(|to| to.contains(from)))
            .copied()
            .collect();
        if to.contains(from) {
            found.insert(circle);
        }
    }
    found.into_iter().collect()
}

fn reach<'a>(next: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &str) -> BTreeSet<&'a str> {
    let (mut seen, mut queue) = (BTreeSet::new(), VecDeque::from([from]));
    while let Some(file) = queue.pop_front() {
        for to in next.get(file).into_iter().flatten() {
            if seen.insert(*to) {
                queue.push_back(to);
            }
        }
    }
    seen
}

/// Describes a circle by its arrows, each with the first line that makes it.
pub(crate) fn describe(circle: &[&str], arrows: &[Arrow]) -> String {
    let within = |file: &str| circle.contains(&file);
    let mut lines = BTreeMap::new();
    for arrow in
        arrows.iter().filter(|arrow| arrow.from != arrow.to && within(&arrow.from) && within(&arrow.to))
    {
        let line = || format!("    {}:{}: `{}` -> {}", arrow.from, arrow.line, arrow.path, arrow.to);
        lines.entry((&arrow.from, &arrow.to)).or_insert_with(line);
    }
    let lines: Vec<_> = lines.into_values().collect();
    format!(
        "{} files form a circle: {}; move the item that both need into a file below them\n{}",
        circle.len(),
        circle.join(", "),
        lines.join("\n")
    )
}
