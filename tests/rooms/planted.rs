//! Wrong arrows of each sort, planted into small crates: the checker finds each, and finds no others.

use crate::arrows::{Arrow, arrows};
use crate::rules::{circles, wrong_arrows};
use std::collections::BTreeMap;

/// A library of rooms with a type in each; `plant` replaces or adds files.
fn house(plant: &[(&str, &str)]) -> Vec<Arrow> {
    let sound = [
        (
            "lib.rs",
            "mod api; mod serve; mod fault; mod space; pub mod source; mod policy; mod error; pub use api::Region;",
        ),
        ("api/mod.rs", "mod region; pub use region::Region;"),
        ("api/region.rs", "use crate::serve::Served; pub struct Region(Served);"),
        ("serve/mod.rs", "pub(crate) mod served; pub(crate) use served::Served;"),
        ("serve/served.rs", "pub struct Served(crate::space::Mapping);"),
        ("fault/mod.rs", "use crate::space::{Mapping, page_table::{self, Claim}}; pub trait Host {}"),
        ("space/mod.rs", "pub mod page_table; use page_table::Claim; pub struct Mapping(Claim);"),
        ("space/page_table.rs", "use crate::error::Error; pub struct Claim; pub struct PageTable;"),
        ("source/mod.rs", "pub use crate::error::Error as Failure; pub trait Source {}"),
        ("policy/mod.rs", "pub struct Policy;"),
        ("error.rs", "pub struct Error;"),
    ];
    let files: BTreeMap<_, _> =
        sound.iter().chain(plant).map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    let (found, globs) = arrows(&files);
    assert_eq!(globs, Vec::<String>::new());
    found
}

/// The one error that a planted file causes.
#[track_caller]
fn error_of(file: &str, text: &str) -> String {
    let errors = wrong_arrows(&house(&[(file, text)]));
    assert_eq!(errors.len(), 1, "{errors:#?}");
    errors[0].clone()
}

#[track_caller]
fn no_error_of(file: &str, text: &str) {
    assert_eq!(wrong_arrows(&house(&[(file, text)])), Vec::<String>::new());
}

#[test]
fn a_sound_house_has_no_errors_and_no_circles() {
    let arrows = house(&[]);
    assert!(arrows.len() >= 7, "{arrows:#?}");
    assert_eq!(wrong_arrows(&arrows), Vec::<String>::new());
    assert_eq!(circles(&arrows), Vec::<Vec<&str>>::new());
}

#[test]
fn an_import_that_runs_back_is_an_error_with_file_line_and_path() {
    let error = error_of("space/page_table.rs", "\n\nuse crate::serve::Served;");
    assert!(
        error.starts_with("space/page_table.rs:3: `crate::serve::Served` (defined in serve/served.rs): the arrow from space to serve runs back"),
        "{error}"
    );
}

#[test]
fn an_inline_path_without_an_import_is_an_error() {
    error_of("space/page_table.rs", "fn f(x: &u8) { let y = crate::serve::Served::new(*x as *const u8); }");
    error_of("space/page_table.rs", "pub struct Claim { next: *const crate::serve::served::Served }");
    error_of("space/page_table.rs", "macro_rules! m { () => { $crate::serve::Served } }");
}

#[test]
fn a_path_of_super_is_an_error() {
    error_of("space/page_table.rs", "use super::super::serve::Served;");
    error_of("space/page_table.rs", "fn f() -> super::super::serve::served::Served {}");
    error_of("space/page_table.rs", "mod inner { use super::super::super::fault::Host; }");
}

#[test]
fn a_path_through_a_reexport_is_an_error() {
    let error = error_of("space/page_table.rs", "use crate::Region;");
    assert!(error.contains("(defined in api/region.rs): the arrow from space to api runs back"), "{error}");
    let error = error_of("policy/mod.rs", "use crate::source::Failure;");
    assert!(
        error.contains("(defined in error.rs): the arrow from policy to source goes sideways"),
        "{error}"
    );
}

#[test]
fn a_path_through_a_renamed_import_is_an_error() {
    error_of("space/page_table.rs", "use crate::Region as Area; fn f(area: Area) {}");
    let errors = wrong_arrows(&house(&[(
        "space/page_table.rs",
        "use crate as root; fn f() -> root::serve::Served {}",
    )]));
    assert_eq!(errors.len(), 1, "{errors:#?}");
}

#[test]
fn an_import_in_braces_is_an_error() {
    let error = error_of("space/page_table.rs", "use crate::{error::Error,\n    serve::{Served as S}};");
    assert!(error.starts_with("space/page_table.rs:2: `crate::serve::Served`"), "{error}");
}

#[test]
fn an_import_in_a_function_is_an_error() {
    error_of("space/page_table.rs", "fn f() { if true { use crate::fault::Host; } }");
}

#[test]
fn a_room_without_an_order_is_an_error() {
    let root = "mod api; mod serve; mod fault; mod space; mod source; mod policy; mod error; mod attic; pub use api::Region;";
    let arrows = house(&[("lib.rs", root), ("attic.rs", "use crate::error::Error;")]);
    let errors = wrong_arrows(&arrows);
    assert!(errors[0].contains("the arrow from attic to error has no order"), "{errors:#?}");
}

#[test]
fn comments_strings_and_tests_are_no_arrows() {
    no_error_of(
        "space/page_table.rs",
        "//! [`crate::serve::Served`]\n/* crate::api::Region */ const A: &str = \"crate::fault::Host\";",
    );
    no_error_of("space/page_table.rs", "#[cfg(test)] mod tests { use crate::serve::Served; } struct A;");
    no_error_of(
        "space/page_table.rs",
        "#[cfg(all(test, not(shuttle)))] use crate::{serve::Served, api::Region}; struct A;",
    );
    no_error_of("space/page_table.rs", "struct A { #[cfg(test)] a: crate::serve::Served, b: u8 }");
    no_error_of(
        "space/page_table.rs",
        "#[cfg(test)] fn f<A, B>(a: A) -> crate::serve::Served { B } struct A;",
    );
}

#[test]
fn code_after_a_test_is_code() {
    error_of("space/page_table.rs", "#[cfg(test)] mod tests { mod a {} } use crate::serve::Served;");
    error_of("space/page_table.rs", "struct A { #[cfg(test)] a: u8, b: crate::serve::Served }");
    error_of("space/page_table.rs", "#[cfg(not(test))] use crate::serve::Served;");
}

#[test]
fn children_that_need_their_module_and_are_needed_by_it_form_a_circle() {
    let arrows = house(&[("space/page_table.rs", "pub struct Claim; fn f(map: &super::Mapping) {}")]);
    assert_eq!(circles(&arrows), [["space/mod.rs", "space/page_table.rs"]]);
}

#[test]
fn children_that_need_a_module_which_only_declares_them_form_no_circle() {
    let door = "pub mod page_table; pub use page_table::Claim; pub struct Mapping;";
    let arrows =
        house(&[("space/mod.rs", door), ("space/page_table.rs", "pub struct Claim(super::Mapping);")]);
    assert_eq!(circles(&arrows), Vec::<Vec<&str>>::new());
}

#[test]
fn a_circle_through_reexports_and_macros_is_found() {
    let plant = [
        ("fault/mod.rs", "mod a; mod b; mod c; pub use a::A; pub use b::B; pub trait Host {}"),
        ("fault/a.rs", "pub struct A(crate::fault::B);"),
        ("fault/b.rs", "pub struct B; fn f() { shout!() }"),
        ("fault/c.rs", "macro_rules! shout { () => { $crate::fault::A } }"),
    ];
    assert_eq!(circles(&house(&plant)), [["fault/a.rs", "fault/b.rs", "fault/c.rs"]]);
}

#[test]
fn an_import_of_all_names_is_an_error() {
    let files = [
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", "pub struct A;"),
        ("b.rs", "use crate::a::*; use std::io::prelude::*;"),
    ];
    let (_, globs) = arrows(&files.map(|(name, text)| (name.to_owned(), text.to_owned())).into());
    assert_eq!(globs, ["b.rs:1: `crate::a::*` hides arrows: import each item by its name"]);
}
