//! Function tools as harmony describes them to the model: TypeScript types made from JSON schemas, agreeing byte for byte
//! with crate `openai-harmony`, whose odd cases the model was trained on.

use std::fmt::Write;

use serde_json::Value;

use super::Tool;

/// The `# Tools` section of a developer message, with `tools` in the namespace `functions`; at least one.
pub(super) fn tools_section(tools: &[Tool]) -> String {
    let mut out = "# Tools\n\n## functions\n\nnamespace functions {\n\n".to_owned();
    for tool in tools {
        for line in tool.description.lines() {
            out += &format!("// {line}\n");
        }
        match &tool.parameters {
            Some(schema) => out += &format!("type {} = (_: {}) => any;\n\n", tool.name, type_of(schema, "")),
            None => out += &format!("type {} = () => any;\n\n", tool.name),
        }
    }
    out + "} // namespace functions"
}

/// The type that `schema` describes. Lines after the first begin with `indent`.
fn type_of(schema: &Value, indent: &str) -> String {
    if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
        return variants.iter().fold(String::new(), |out, variant| {
            let default = variant.get("default").map(|default| match default.as_str() {
                Some(text) if !is_enum(variant) => format!("default: \"{text}\""),
                _ => format!("default: {default}"),
            });
            out + &format!("\n{indent} | ") + &variant_type(variant, indent, text_of(variant, "description"), default)
        });
    }
    if let Some(types) = schema.get("type").and_then(Value::as_array) {
        let names = types.iter().filter_map(Value::as_str);
        let names: Vec<&str> = names.map(|name| if name == "integer" { "number" } else { name }).collect();
        if !names.is_empty() {
            return names.join(" | ");
        }
    }
    match text_of(schema, "type") {
        Some("object") => object_type(schema, indent),
        Some("string") => {
            let values = schema.get("enum").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
            let values: Vec<String> = values.map(|value| format!("\"{value}\"")).collect();
            if values.is_empty() { "string".to_owned() } else { values.join(" | ") }
        }
        Some("number" | "integer") => "number".to_owned(),
        Some("boolean") => "boolean".to_owned(),
        Some("array") => match schema.get("items") {
            Some(items) => type_of(items, indent) + "[]",
            None => "Array<any>".to_owned(),
        },
        _ => "any".to_owned(),
    }
}

fn object_type(schema: &Value, indent: &str) -> String {
    let mut out = comment(schema, "description", indent);
    out += "{\n";
    let required: Vec<&str> =
        schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let mark = if required.contains(&name.as_str()) { "" } else { "?" };
        if let Some(title) = text_of(property, "title") {
            out += &format!("{indent}// {title}\n{indent}//\n");
        }
        if property.get("oneOf").is_none() {
            out += &comment(property, "description", indent);
        }
        if let Some(examples) = property.get("examples").and_then(Value::as_array).filter(|list| !list.is_empty()) {
            out += &format!("{indent}// Examples:\n");
            for example in examples.iter().filter_map(Value::as_str) {
                out += &format!("{indent}// - \"{example}\"\n");
            }
        }
        if let Some(variants) = property.get("oneOf").and_then(Value::as_array) {
            out += &union_property(name, mark, property, variants, indent);
            continue;
        }
        let mut written = type_of(property, &format!("{indent}    "));
        add_null(property, &mut written);
        out += &format!("{indent}{name}{mark}: {written},");
        if property.get("oneOf").is_none()
            && let Some(default) = default_of(property)
        {
            out += &format!(" // {default}");
        }
        out.push('\n');
    }
    out + indent + "}"
}

/// A property whose schema is `oneOf`: its comments, its name, and a line for each variant.
fn union_property(name: &str, mark: &str, property: &Value, variants: &[Value], indent: &str) -> String {
    let description = text_of(property, "description");
    let first = variants.first().and_then(|variant| text_of(variant, "description"));
    let stands_above = description.is_some() && description != first;
    let mut out = if stands_above { comment(property, "description", indent) } else { String::new() };
    if let Some(default) = default_of(property) {
        out += &format!("{indent}// {default}\n");
    }
    out += &format!("{indent}{name}{mark}:\n");
    for (index, variant) in variants.iter().enumerate() {
        let own = text_of(variant, "description").filter(|&own| Some(own) != description);
        let own = own.filter(|_| index > 0 || !stands_above);
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{indent} | {}", variant_type(variant, indent, own, default_of(variant)));
    }
    out + indent + ",\n"
}

/// A variant's type, and its description and default in a comment behind it.
fn variant_type(variant: &Value, indent: &str, description: Option<&str>, default: Option<String>) -> String {
    let mut out = type_of(variant, &format!("{indent}   "));
    add_null(variant, &mut out);
    let remarks: Vec<String> = description.map(str::to_owned).into_iter().chain(default).collect();
    if !remarks.is_empty() {
        out += &format!(" // {}", remarks.join(" "));
    }
    out
}

fn add_null(schema: &Value, written: &mut String) {
    let is_nullable = schema.get("nullable").and_then(Value::as_bool) == Some(true);
    if is_nullable && !written.contains("null") {
        *written += " | null";
    }
}

fn default_of(schema: &Value) -> Option<String> {
    let default = schema.get("default")?;
    Some(match default.as_str() {
        Some(text) if is_enum(schema) => format!("default: {text}"),
        Some(text) => format!("default: \"{text}\""),
        None => format!("default: {default}"),
    })
}

fn comment(schema: &Value, key: &str, indent: &str) -> String {
    text_of(schema, key).map(|text| format!("{indent}// {text}\n")).unwrap_or_default()
}

fn text_of<'v>(schema: &'v Value, key: &str) -> Option<&'v str> {
    schema.get(key).and_then(Value::as_str)
}

fn is_enum(schema: &Value) -> bool {
    schema.get("enum").and_then(Value::as_array).is_some_and(|values| !values.is_empty())
}
