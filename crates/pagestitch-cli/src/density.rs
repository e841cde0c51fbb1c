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
    /// More of its pages have left because of a budget than are present.
    Evicted,
    /// Half or more of its present pages had left before.
    Returned,
    /// A page is poisoned, because its bytes were unavailable.
    Lost,
}

impl Density {
    pub(crate) const EACH: [Self; 8] =
        [Self::None, Self::Few, Self::Some, Self::Most, Self::All, Self::Evicted, Self::Returned, Self::Lost];

    pub(crate) fn of(part: &Coverage) -> Self {
        match *part {
            Coverage { poisoned: 1.., .. } => Self::Lost,
            Coverage { evicted, present, .. } if evicted > present => Self::Evicted,
            Coverage { returned: back @ 1.., present, .. } if back * 2 >= present => Self::Returned,
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
            Self::Few => "up to 10 %",
            Self::Some => "up to half",
            Self::Most => "more than half",
            Self::All => "all present",
            Self::Evicted => "mostly evicted",
            Self::Returned => "mostly back",
            Self::Lost => "a page is lost",
        }
    }

    /// The densities that a map of these parts may show. A part of one page is never half full, and only
    /// pages of a region with a budget leave.
    pub(crate) fn possible(parts: &[Coverage]) -> impl Iterator<Item = Self> {
        let single = parts.iter().all(|part| part.pages <= 1);
        let has_left = parts.iter().any(|part| part.evicted + part.returned > 0);
        Self::EACH.into_iter().filter(move |density| match density {
            Self::Few | Self::Some | Self::Most => !single,
            Self::Evicted | Self::Returned => has_left,
            Self::None | Self::All | Self::Lost => true,
        })
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

    pub(crate) fn left(part: Coverage, evicted: u64, returned: u64) -> Coverage {
        let mut left = part;
        (left.evicted, left.returned) = (evicted, returned);
        left
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

    #[test]
    fn pages_that_have_left_and_come_back_are_told_apart() {
        let of = |present, evicted, returned| Density::of(&left(part(present, 100, 0), evicted, returned));
        assert_eq!([of(0, 1, 0), of(10, 11, 10), of(0, 100, 0)], [Density::Evicted; 3]);
        assert_eq!([of(1, 0, 1), of(50, 50, 25), of(100, 0, 100)], [Density::Returned; 3]);
        assert_eq!(
            [of(50, 50, 24), of(0, 0, 0), of(100, 0, 1)],
            [Density::Some, Density::None, Density::All]
        );
        assert_eq!(Density::of(&left(part(1, 9, 1), 5, 1)), Density::Lost);
        let possible: Vec<Density> = Density::possible(&[left(part(0, 1, 0), 1, 0)]).collect();
        let both = [Density::Evicted, Density::Returned];
        assert_eq!(possible, [&[Density::None, Density::All], &both[..], &[Density::Lost]].concat());
    }
}
