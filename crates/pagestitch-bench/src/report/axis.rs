//! A logarithmic axis: its range, its ticks, and the labels that have room.

/// A logarithmic axis.
pub(super) struct Axis {
    low: f64,
    high: f64,
    /// The ticks, from low to high.
    pub(super) ticks: Vec<Tick>,
}

/// A tick of an axis.
pub(super) struct Tick {
    /// The position, from 0 at the low end to 1 at the high end.
    pub(super) at: f64,
    pub(super) label: String,
    pub(super) shown: Shown,
    importance: Importance,
}

/// The charts in which the label of a tick has room. Its line is drawn in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    Always,
    InWideCharts,
    Never,
}

/// The order in which labels take their room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Importance {
    /// An end of the axis, which tells its range.
    End,
    /// A power of ten, or a measured point.
    Main,
    /// Twice or five times a power of ten. Either all of these have labels or none, because a label
    /// at some of them would look like an error.
    Between,
}

/// The least length of an axis in pixels, and the room that a label needs along it.
pub(super) struct Room {
    /// In a wide chart.
    pub(super) wide: f64,
    /// In a narrow one.
    pub(super) narrow: f64,
    pub(super) of_label: fn(&str) -> f64,
}

impl Axis {
    /// An axis with ticks at measured points, in ascending order.
    pub(super) fn at(points: &[f64], label: impl Fn(f64) -> String, room: &Room) -> Self {
        let (low, high) = widened(points);
        let ticks = points.iter().map(|&point| (point, Importance::Main));
        Self::new(low, high, ticks.collect(), label, room)
    }

    /// An axis around values, with ticks at 1, 2 and 5 times the powers of ten. It begins and ends
    /// at a tick.
    pub(super) fn around(values: &[f64], label: impl Fn(f64) -> String, room: &Room) -> Self {
        let (low, high) = widened(values);
        let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
        let round = powers.flat_map(|power| {
            let times = |factor: f64| factor * 10_f64.powi(power);
            [
                (times(1.0), Importance::Main),
                (times(2.0), Importance::Between),
                (times(5.0), Importance::Between),
            ]
        });
        let round: Vec<_> = round.collect();
        // A value may differ from its tick in the last bit.
        let first = round.iter().rposition(|tick| tick.0 <= low * (1.0 + NEAR)).unwrap_or(0);
        let last = round.iter().position(|tick| tick.0 >= high * (1.0 - NEAR)).unwrap_or(round.len() - 1);
        Self::new(round[first].0, round[last].0, round[first..=last].to_vec(), label, room)
    }

    fn new(
        low: f64,
        high: f64,
        ticks: Vec<(f64, Importance)>,
        label: impl Fn(f64) -> String,
        room: &Room,
    ) -> Self {
        let mut axis = Self { low, high, ticks: Vec::new() };
        let last = ticks.len().saturating_sub(1);
        let ticks = ticks.into_iter().enumerate().map(|(index, (value, importance))| Tick {
            at: axis.position(value),
            label: label(value),
            shown: Shown::Never,
            importance: if index == 0 || index == last { Importance::End } else { importance },
        });
        axis.ticks = ticks.collect();
        axis.show_labels(room);
        axis
    }

    /// The position of a value, from 0 at the low end to 1 at the high end.
    pub(super) fn position(&self, value: f64) -> f64 {
        (value / self.low).ln() / (self.high / self.low).ln()
    }

    fn show_labels(&mut self, room: &Room) {
        let all: Vec<usize> = (0..self.ticks.len()).collect();
        let wide = self.with_room(&all, room.wide, room.of_label);
        let narrow = self.with_room(&wide, room.narrow, room.of_label);
        wide.iter().for_each(|&index| self.ticks[index].shown = Shown::InWideCharts);
        narrow.iter().for_each(|&index| self.ticks[index].shown = Shown::Always);
    }

    /// The candidates whose labels fit side by side on an axis of a length in pixels.
    fn with_room(&self, candidates: &[usize], length: f64, of_label: fn(&str) -> f64) -> Vec<usize> {
        let clear = |one: usize, other: usize| {
            let [a, b] = [one, other].map(|index| &self.ticks[index]);
            (a.at - b.at).abs() * length >= f64::midpoint(of_label(&a.label), of_label(&b.label))
        };
        let of = |importance| {
            candidates.iter().copied().filter(move |&index| self.ticks[index].importance == importance)
        };
        let mut chosen: Vec<usize> = Vec::new();
        for index in of(Importance::End).chain(of(Importance::Main)) {
            if chosen.iter().all(|&other| clear(index, other)) {
                chosen.push(index);
            }
        }
        let mut with_between: Vec<usize> = chosen.iter().copied().chain(of(Importance::Between)).collect();
        with_between.sort_unstable();
        let fit = with_between.windows(2).all(|pair| clear(pair[0], pair[1]));
        if fit { with_between } else { chosen }
    }
}

/// The least and the largest value. The two ends of an axis must differ.
fn widened(values: &[f64]) -> (f64, f64) {
    let low = values.iter().copied().fold(f64::MAX, f64::min);
    let high = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    if low < high { (low, high) } else { (high * 0.5, high * 2.0) }
}

/// A relative difference that no picture shows.
const NEAR: f64 = 1e-9;

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Room = Room { wide: 500.0, narrow: 220.0, of_label: |label| 8.0 + 7.0 * label.len() as f64 };

    /// The labels in a wide or in a narrow chart.
    fn labels(axis: &Axis, wide: bool) -> Vec<&Tick> {
        let shown = |tick: &&Tick| tick.shown == Shown::Always || wide && tick.shown == Shown::InWideCharts;
        axis.ticks.iter().filter(shown).collect()
    }

    fn check(axis: &Axis) {
        for (wide, length) in [(true, ROOM.wide), (false, ROOM.narrow)] {
            let shown = labels(axis, wide);
            for pair in shown.windows(2) {
                let [a, b] = [pair[0], pair[1]];
                let (end, start) = (
                    a.at * length + (ROOM.of_label)(&a.label) / 2.0,
                    b.at * length - (ROOM.of_label)(&b.label) / 2.0,
                );
                assert!(end <= start + 1e-6, "{} and {} overlap in {length} pixels", a.label, b.label);
            }
            let ends = [axis.ticks.first(), axis.ticks.last()].map(|tick| tick.unwrap().label.as_str());
            let outer = [shown.first(), shown.last()].map(|tick| tick.unwrap().label.as_str());
            assert_eq!(ends, outer, "both ends have a label");
        }
    }

    #[test]
    fn labels_do_not_overlap_and_both_ends_have_one() {
        let figure = |value: f64| format!("{value}");
        for low in [0.001, 0.09, 1.0, 7.0, 1234.5] {
            for factor in [1.0, 1.2, 3.0, 10.0, 99.0, 1e4, 1e8] {
                let axis = Axis::around(&[low * factor, low], figure, &ROOM);
                check(&axis);
                let inside = |value: f64| (-1e-6..=1.0 + 1e-6).contains(&axis.position(value));
                assert!(inside(low) && inside(low * factor), "{low} times {factor}");
            }
        }
        for points in
            [&[0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0][..], &[1.0, 2.0, 4.0, 8.0], &[1e3, 1e4, 1e7], &[4.0]]
        {
            check(&Axis::at(points, figure, &ROOM));
        }
    }

    #[test]
    fn labels_between_powers_of_ten_are_shown_all_or_not_at_all() {
        let shown = |high: f64| -> Vec<String> {
            let axis = Axis::around(&[1.0, high], |value| format!("{value:e}"), &ROOM);
            labels(&axis, true).into_iter().map(|tick| tick.label.clone()).collect()
        };
        assert_eq!(shown(90.0), ["1e0", "2e0", "5e0", "1e1", "2e1", "5e1", "1e2"]);
        assert_eq!(shown(1e9).len(), 10, "powers of ten only");
    }

    #[test]
    fn a_position_is_logarithmic() {
        let axis = Axis::around(&[1.0, 100.0], |value| value.to_string(), &ROOM);
        assert_eq!(
            [1.0, 10.0, 100.0].map(|value| (axis.position(value) * 100.0).round()),
            [0.0, 50.0, 100.0]
        );
    }
}
