//! The types of what goes over QMP, as they are declared, and what `query-qmp-schema` says of them.
//!
//! A declaration ([`Type`], [`Member`]) is data: arguments are checked against it, and QEMU's introspection (`qapi/introspect.json`:
//! a list of SchemaInfo) is made from it, under plain type names. What is declared stands in [`super::types`].

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::qmp::Error;

/// A type.
#[derive(Debug, Clone, Copy)]
pub(super) enum Type {
    /// Text.
    Str,
    /// A whole number, never negative.
    Int,
    /// True or false.
    Bool,
    /// Anything.
    Any,
    /// Many of one type.
    List(&'static Type),
    /// Members by name.
    Object(&'static Object),
    /// One of some words.
    Enum(&'static Enum),
}

/// Members by name.
#[derive(Debug)]
pub(super) struct Object {
    pub(super) name: &'static str,
    pub(super) members: &'static [Member],
    /// The member that says which more there are, and which those are.
    pub(super) variants: Option<(&'static str, &'static [(&'static str, &'static Object)])>,
}

/// One of an object, or one argument.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: &'static str,
    pub(super) of: Type,
    pub(super) optional: bool,
}

/// Words.
#[derive(Debug)]
pub(super) struct Enum {
    pub(super) name: &'static str,
    pub(super) values: &'static [&'static str],
}

/// A member that is always there.
pub(super) const fn has(name: &'static str, of: Type) -> Member {
    Member { name, of, optional: false }
}

/// A member that may be left out.
pub(super) const fn may(name: &'static str, of: Type) -> Member {
    Member { name, of, optional: true }
}

/// An object without variants.
pub(super) const fn object(name: &'static str, members: &'static [Member]) -> Object {
    Object { name, members, variants: None }
}

/// What a command without arguments takes, and one without an answer returns.
pub(super) static EMPTY: Object = object("q_empty", &[]);

impl Type {
    /// Its name in the schema.
    pub(super) fn name(&self) -> String {
        match self {
            Type::Str => "str".to_owned(),
            Type::Int => "int".to_owned(),
            Type::Bool => "bool".to_owned(),
            Type::Any => "any".to_owned(),
            Type::List(of) => format!("[{}]", of.name()),
            Type::Object(object) => object.name.to_owned(),
            Type::Enum(of) => of.name.to_owned(),
        }
    }

    /// Refuses a value of another type, in QEMU's words.
    ///
    /// # Errors
    /// What it should have been.
    pub(super) fn check(&self, name: &str, value: &Value) -> Result<(), Error> {
        let wrong =
            |wanted: &str| Error::generic(format!("Invalid parameter type for '{name}', expected: {wanted}"));
        match self {
            Type::Any => Ok(()),
            Type::Str => value.as_str().map(drop).ok_or_else(|| wrong("string")),
            Type::Int => value.as_u64().map(drop).ok_or_else(|| wrong("integer")),
            Type::Bool => value.as_bool().map(drop).ok_or_else(|| wrong("boolean")),
            Type::List(of) => {
                let list = value.as_array().ok_or_else(|| wrong("array"))?;
                list.iter().enumerate().try_for_each(|(i, v)| of.check(&format!("{name}[{i}]"), v))
            }
            Type::Enum(of) => {
                let word = value.as_str().ok_or_else(|| wrong("string"))?;
                if of.values.contains(&word) {
                    return Ok(());
                }
                Err(Error::generic(format!("Parameter '{name}' does not accept value '{word}'")))
            }
            Type::Object(object) => {
                let map = value.as_object().ok_or_else(|| wrong("object"))?;
                let of_case = object.variants.and_then(|(tag, cases)| {
                    let said = map.get(tag)?.as_str()?;
                    cases.iter().find(|(case, _)| *case == said)
                });
                let more = of_case.map_or(&[][..], |(_, more)| more.members);
                check_all(object.members.iter().chain(more), map)
            }
        }
    }
}

/// Refuses what is missing, of another type, or too much.
///
/// # Errors
/// In QEMU's words.
pub(super) fn check_members(members: &[Member], given: &serde_json::Map<String, Value>) -> Result<(), Error> {
    check_all(members.iter(), given)
}

fn check_all<'a>(
    members: impl Iterator<Item = &'a Member> + Clone,
    given: &serde_json::Map<String, Value>,
) -> Result<(), Error> {
    for member in members.clone() {
        match given.get(member.name) {
            Some(value) => member.of.check(member.name, value)?,
            None if member.optional => {}
            None => return Err(Error::generic(format!("Parameter '{}' is missing", member.name))),
        }
    }
    match given.keys().find(|key| members.clone().all(|m| m.name != key.as_str())) {
        Some(key) => Err(Error::generic(format!("Parameter '{key}' is unexpected"))),
        None => Ok(()),
    }
}

/// The schema under construction: SchemaInfo by name and meta-type.
#[derive(Default)]
pub(super) struct Schema(BTreeMap<(String, bool), Value>);

impl Schema {
    /// Adds a command and all types that it speaks of.
    pub(super) fn command(&mut self, name: &'static str, args: &'static [Member], returns: &Type) {
        let arg_type = self.members_of(name, args);
        self.add(returns);
        let info = json!({
            "meta-type": "command", "name": name, "arg-type": arg_type, "ret-type": returns.name(),
            "allow-oob": false,
        });
        self.0.insert((name.to_owned(), true), info);
    }

    /// Adds an event and all types that it speaks of.
    pub(super) fn event(&mut self, name: &'static str, data: &'static [Member]) {
        let arg_type = self.members_of(name, data);
        let info = json!({ "meta-type": "event", "name": name, "arg-type": arg_type });
        self.0.insert((name.to_owned(), true), info);
    }

    /// All of it.
    pub(super) fn into_value(self) -> Value {
        self.0.into_values().collect()
    }

    /// The object that arguments make, which has no name of its own.
    fn members_of(&mut self, of: &str, members: &'static [Member]) -> String {
        if members.is_empty() {
            self.add(&Type::Object(&EMPTY));
            return EMPTY.name.to_owned();
        }
        let name = format!("q_obj_{of}-arg");
        self.object(&name, members, None);
        name
    }

    fn object(
        &mut self,
        name: &str,
        members: &'static [Member],
        variants: Option<(&'static str, &'static [(&'static str, &'static Object)])>,
    ) {
        let key = (name.to_owned(), false);
        if self.0.contains_key(&key) {
            return;
        }
        let listed: Vec<Value> = members
            .iter()
            .map(|m| match m.optional {
                true => json!({ "name": m.name, "type": m.of.name(), "default": null }),
                false => json!({ "name": m.name, "type": m.of.name() }),
            })
            .collect();
        let mut info = json!({ "meta-type": "object", "name": name, "members": listed });
        if let Some((tag, cases)) = variants {
            info["tag"] = tag.into();
            info["variants"] =
                cases.iter().map(|(case, object)| json!({ "case": case, "type": object.name })).collect();
        }
        // Before its members: an object may have itself in it.
        self.0.insert(key, info);
        members.iter().for_each(|m| self.add(&m.of));
        for (_, object) in variants.iter().flat_map(|(_, cases)| *cases) {
            self.add(&Type::Object(object));
        }
    }

    fn add(&mut self, of: &Type) {
        let builtin =
            |json_type: &str| json!({ "meta-type": "builtin", "name": of.name(), "json-type": json_type });
        let info = match of {
            Type::Str => builtin("string"),
            Type::Int => builtin("int"),
            Type::Bool => builtin("boolean"),
            Type::Any => builtin("value"),
            Type::List(element) => {
                self.add(element);
                json!({ "meta-type": "array", "name": of.name(), "element-type": element.name() })
            }
            Type::Enum(e) => {
                let members: Vec<Value> = e.values.iter().map(|v| json!({ "name": v })).collect();
                json!({ "meta-type": "enum", "name": e.name, "members": members, "values": e.values })
            }
            Type::Object(object) => return self.object(object.name, object.members, object.variants),
        };
        self.0.insert((of.name(), false), info);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static ALL: Object = object(
        "All",
        &[
            has("words", Type::List(&Type::Str)),
            may("colour", Type::Enum(&Enum { name: "Colour", values: &["red", "blue"] })),
            may("below", Type::Object(&ALL)),
        ],
    );

    #[test]
    fn a_value_of_another_type_is_refused_in_qemus_words() {
        let refused = |value: Value| Type::Object(&ALL).check("all", &value).unwrap_err().desc;
        assert!(Type::Object(&ALL).check("all", &json!({ "words": ["a"], "colour": "red" })).is_ok());
        assert_eq!(refused(json!(1)), "Invalid parameter type for 'all', expected: object");
        assert_eq!(refused(json!({})), "Parameter 'words' is missing");
        assert_eq!(
            refused(json!({ "words": [1] })),
            "Invalid parameter type for 'words[0]', expected: string"
        );
        let green = json!({ "words": [], "colour": "green" });
        assert_eq!(refused(green), "Parameter 'colour' does not accept value 'green'");
        assert_eq!(refused(json!({ "words": [], "x": 1 })), "Parameter 'x' is unexpected");
        assert_eq!(refused(json!({ "words": [], "below": {} })), "Parameter 'words' is missing");
    }

    #[test]
    fn what_an_object_has_in_its_case_alone_is_checked_too() {
        static RED: Object = object("Red", &[has("depth", Type::Int)]);
        static KIND: Enum = Enum { name: "Kind", values: &["red", "plain"] };
        static PAINT: Object = Object {
            name: "Paint",
            members: &[has("type", Type::Enum(&KIND))],
            variants: Some(("type", &[("red", &RED)])),
        };
        let check = |value: Value| Type::Object(&PAINT).check("paint", &value).map_err(|e| e.desc);
        assert_eq!(check(json!({ "type": "red", "depth": 1 })), Ok(()));
        assert_eq!(check(json!({ "type": "plain" })), Ok(()));
        assert_eq!(check(json!({ "type": "red" })), Err("Parameter 'depth' is missing".into()));
        assert_eq!(
            check(json!({ "type": "plain", "depth": 1 })),
            Err("Parameter 'depth' is unexpected".into())
        );
    }

    #[test]
    fn an_object_that_has_itself_in_it_stands_in_the_schema_once() {
        let mut schema = Schema::default();
        schema.command("ask", &[], &Type::Object(&ALL));
        let all = schema.into_value();
        let names: Vec<&str> = all.as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["All", "Colour", "[str]", "ask", "q_empty", "str"]);
    }
}
