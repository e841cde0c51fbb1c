//! The share of present pages in a part of a region, in few steps that a picture can show.

use pagestitch::Coverage;

/// The density of the present pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Density {
    None,
    Few,
    Some,
    Most,
    All,
    /// A page is poisoned, because its bytes were unavailable.
    Lost,
}

impl Density {
    pub(crate) const EACH: [Self; 6] = [Self::None, Self::Few, Self::Some, Self::Most, Self::All, Self::Lost];

    pub(crate) fn of(part: &Coverage) -> Self {
        match *part {
            Coverage { poisoned: 1.., .. } => Self::Lost,
            Coverage { present: 0, .. } => Self::None,
            Coverage { present, pages, .. } if present >= pages => Self::All,
            Coverage { present, pages, .. } if present * 10 <= pages => Self::Few,
            Coverage { present, pages, .. } if present * 2 <= pages => Self::Some,
            Coverage { .. } => Self::Most,
        }
    }

    /// The entry of a legend.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "absent",
            Self::Few => "up to 10 % present",
            Self::Some => "up to half",
            Self::Most => "more than half",
            Self::All => "all present",
            Self::Lost => "a page is lost",
        }
    }

    /// The densities that a map of these parts may show. A part of one page is never half full.
    pub(crate) fn possible(parts: &[Coverage]) -> impl Iterator<Item = Self> {
        let single = parts.iter().all(|part| part.pages <= 1);
        let between = |density| matches!(density, Self::Few | Self::Some | Self::Most);
        Self::EACH.into_iter().filter(move |&density| !(single && between(density)))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn part(present: u64, pages: u64, poisoned: u64) -> Coverage {
        let mut part = Coverage::default();
        (part.pages, part.present, part.poisoned) = (pages, present, poisoned);
        part
    }

    #[test]
    fn one_page_of_many_is_not_as_dense_as_all_of_them() {
        let densities = [0, 1, 50, 51, 250, 251, 499, 500].map(|present| Density::of(&part(present, 500, 0)));
        let [few, some, most] = [Density::Few, Density::Some, Density::Most];
        assert_eq!(densities, [Density::None, few, few, some, some, most, most, Density::All]);
        assert_eq!(Density::of(&part(499, 500, 1)), Density::Lost);
        assert_eq!(Density::of(&part(1, 1, 0)), Density::All);
    }

    #[test]
    fn a_part_of_one_page_is_absent_present_or_lost() {
        let possible: Vec<Density> = Density::possible(&[part(1, 1, 0), part(0, 1, 0)]).collect();
        assert_eq!(possible, [Density::None, Density::All, Density::Lost]);
        assert_eq!(Density::possible(&[part(1, 2, 0)]).count(), 6);
    }
}
