//! The `#[kernel]` attribute of `cuda_std`; documented there by its re-export.

use proc_macro::TokenStream;
use proc_macro2::{Ident, Span, TokenStream as Tokens};
use quote::{format_ident, quote};
use syn::parse::{Parse, ParseStream};
use syn::spanned::Spanned;
use syn::{Error, Expr, FnArg, GenericArgument, ItemFn, Pat, PathArguments, ReturnType, Token, Type};

/// Makes a function a kernel: one signature, three uses.
///
/// ```ignore
/// #[kernel(threads = 256, blocks_per_sm = 2)]
/// pub unsafe fn scale(out: Disjoint<f32>, x: Global<f32>, factor: f32) { /* … */ }
/// ```
///
/// - On `nvptx64`: the PTX entry `scale`. A slice parameter (`Global<T>`, `Disjoint<T>`, `Atomics<T>`) is flattened to an
///   address and a length, since LLVM 22 gives a by-value struct generic instead of `.global` loads; a scalar (`u32`,
///   `i32`, `u64`, `f32`) stays one parameter. A line `//@ bounds scale threads=256 blocks_per_sm=2` in the PTX tells
///   `cuda_builder` which `.maxntid` and `.minnctapersm` to write, which rustc cannot.
/// - On the host: the same body, for the emulator.
/// - On the host: the typed launcher `scale::run(launcher, launch, out, x, factor)`, taking a `DeviceSlice<T>` for each
///   slice, and `scale::ENTRY`, the interface as data.
///
/// `threads` is the most threads a block may have; `blocks_per_sm` (default 1), how many such blocks an SM must hold. Both
/// are constants, as is `registers`, the most of a thread where grids overlap (`.maxnreg`, in place of `.minnctapersm`). `dynamic_shared` (default 0) is the bytes of its `dynamic_shared_array!`. A kernel marked `waits` calls
/// `grid::wait` itself; others wait first of all, so that any may be launched early. One marked `launches` calls
/// `grid::launch_dependents` itself; others let the next grid start first of all. Of one marked `alone` a multiprocessor gets no two blocks where grids
/// overlap: the host asks for more than half of its shared memory. One marked `warpgroups` uses `cuda_std::wgmma`, and is
/// only in sm_90a's PTX. The function is `unsafe`, returns
/// nothing and has no generics.
#[proc_macro_attribute]
pub fn kernel(attribute: TokenStream, item: TokenStream) -> TokenStream {
    let bounds = syn::parse_macro_input!(attribute as Bounds);
    let function = syn::parse_macro_input!(item as ItemFn);
    expand(&bounds, &function).unwrap_or_else(Error::into_compile_error).into()
}

struct Bounds {
    threads: Expr,
    blocks_per_sm: Expr,
    dynamic_shared: Expr,
    /// 0: no bound.
    registers: Expr,
    waits: bool,
    launches: bool,
    alone: bool,
    warpgroups: bool,
}

impl Parse for Bounds {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        let (mut threads, mut blocks_per_sm, mut dynamic_shared, mut registers) = (None, None, None, None);
        let (mut waits, mut launches, mut alone, mut warpgroups) = (false, false, false, false);
        while !input.is_empty() {
            let name: Ident = input.parse()?;
            let flag = match name.to_string().as_str() {
                "waits" => Some(&mut waits),
                "launches" => Some(&mut launches),
                "alone" => Some(&mut alone),
                "warpgroups" => Some(&mut warpgroups),
                _ => None,
            };
            if let Some(flag) = flag {
                *flag = true;
                if !input.is_empty() {
                    input.parse::<Token![,]>()?;
                }
                continue;
            }
            input.parse::<Token![=]>()?;
            let bound = match name.to_string().as_str() {
                "threads" => &mut threads,
                "blocks_per_sm" => &mut blocks_per_sm,
                "dynamic_shared" => &mut dynamic_shared,
                "registers" => &mut registers,
                _ => {
                    let expected = "expected `threads`, `blocks_per_sm`, `dynamic_shared`, `registers`, `waits`, `launches`, \
                                    `alone` or `warpgroups`";
                    return Err(Error::new(name.span(), expected));
                }
            };
            if bound.replace(input.parse()?).is_some() {
                return Err(Error::new(name.span(), "this bound stands twice"));
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        let threads = threads
            .ok_or_else(|| Error::new(Span::call_site(), "a kernel needs its bound: `#[kernel(threads = 256)]`"))?;
        Ok(Self {
            threads,
            blocks_per_sm: blocks_per_sm.unwrap_or_else(|| syn::parse_quote!(1)),
            dynamic_shared: dynamic_shared.unwrap_or_else(|| syn::parse_quote!(0)),
            registers: registers.unwrap_or_else(|| syn::parse_quote!(0)),
            waits,
            launches,
            alone,
            warpgroups,
        })
    }
}

enum Parameter {
    Slice { wrapper: Ident, element: Box<Type> },
    Scalar(Box<Type>),
}

fn expand(bounds: &Bounds, function: &ItemFn) -> syn::Result<Tokens> {
    let signature = &function.sig;
    if signature.unsafety.is_none() {
        return Err(Error::new(signature.fn_token.span, "a kernel is an `unsafe fn`: its launch is a contract"));
    }
    if let Some(asyncness) = signature.asyncness {
        return Err(Error::new(asyncness.span, "a kernel is not `async`: nobody would poll it"));
    }
    if !signature.generics.params.is_empty() {
        return Err(Error::new(signature.generics.span(), "a kernel has no generics; call a generic function from it"));
    }
    if let ReturnType::Type(_, found) = &signature.output {
        return Err(Error::new(found.span(), "a kernel returns nothing"));
    }

    let (name, visibility) = (&signature.ident, &function.vis);
    let Bounds { threads, blocks_per_sm, dynamic_shared, registers, waits, launches, alone, warpgroups } = bounds;
    let launch = if *launches { quote!() } else { quote!(::cuda_std::grid::launch_dependents();) };
    let wait = if *waits { quote!() } else { quote!(::cuda_std::grid::wait();) };
    let conditional = function.attrs.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    let conditional: Vec<_> = conditional.collect();
    let where_compiled =
        if *warpgroups { quote!(all(target_arch = "nvptx64", warpgroups)) } else { quote!(target_arch = "nvptx64") };

    let (mut flat, mut from_flat) = (Vec::new(), Vec::new());
    let (mut params, mut run_params, mut run_args, mut from_arguments) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (i, input) in signature.inputs.iter().enumerate() {
        let FnArg::Typed(input) = input else {
            return Err(Error::new(input.span(), "a kernel has no `self`"));
        };
        let Pat::Ident(pattern) = &*input.pat else {
            return Err(Error::new(input.pat.span(), "a kernel parameter is a plain name"));
        };
        let (param, ty, text) = (&pattern.ident, &input.ty, pattern.ident.to_string());
        match parameter(ty)? {
            Parameter::Slice { wrapper, element } => {
                let (base, len) = (format_ident!("{param}_base"), format_ident!("{param}_len"));
                let pointer = if wrapper == "Global" { quote!(*const) } else { quote!(*mut) };
                flat.push(quote!(#base: #pointer #element, #len: usize));
                from_flat.push(quote!(<#ty>::from_raw(#base, #len)));
                from_arguments.push(quote!(<#ty>::from_argument(&arguments[#i])));
                run_params.push(quote!(#param: ::cuda_std::DeviceSlice<#element>));
                params.push(quote!(::cuda_std::Param {
                    name: #text,
                    kind: ::cuda_std::ParamKind::#wrapper(<#element as ::cuda_std::Element>::NAME),
                }));
            }
            Parameter::Scalar(scalar) => {
                flat.push(quote!(#param: #scalar));
                from_flat.push(quote!(#param));
                from_arguments.push(quote!(<#scalar as ::core::convert::From<_>>::from(&arguments[#i])));
                run_params.push(quote!(#param: #scalar));
                let scalar = quote!(#scalar).to_string();
                params.push(quote!(::cuda_std::Param { name: #text, kind: ::cuda_std::ParamKind::Scalar(#scalar) }));
            }
        }
        run_args.push(quote!(::core::convert::Into::into(#param)));
    }

    let text = name.to_string();
    let entry_module = format_ident!("{name}_entry");
    let comment =
        format!("//@ bounds {text} threads={{threads}} blocks_per_sm={{blocks_per_sm}} registers={{registers}}");
    let launcher_doc = format!("Interface and typed launcher of the kernel [`{text}`](fn@{text}).");
    Ok(quote! {
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #function

        #(#conditional)*
        #[cfg(#where_compiled)]
        mod #entry_module {
            use super::*;
            ::cuda_std::internal::global_asm!(
                #comment, threads = const { #threads }, blocks_per_sm = const { #blocks_per_sm },
                registers = const { #registers }
            );
            #[unsafe(export_name = #text)]
            unsafe extern "ptx-kernel" fn entry(#(#flat),*) {
                #launch
                // SAFETY: every thread is here; the launch contract is the kernel's own.
                unsafe {
                    #wait
                    super::#name(#(#from_flat),*)
                }
            }
        }

        #(#conditional)*
        #[doc = #launcher_doc]
        #[cfg(not(target_arch = "nvptx64"))]
        #[allow(non_camel_case_types, reason = "the kernel's own name")]
        #visibility enum #name {}

        #(#conditional)*
        #[cfg(not(target_arch = "nvptx64"))]
        impl #name {
            /// The kernel's interface, for machines that run it.
            pub const ENTRY: &'static ::cuda_std::Entry = &::cuda_std::Entry {
                name: #text,
                params: &[#(#params),*],
                threads: {
                    let threads: u32 = #threads;
                    ::core::assert!(1 <= threads && threads <= 1024, "a block has 1 to 1024 threads");
                    threads
                },
                blocks_per_sm: #blocks_per_sm,
                dynamic_shared: (#dynamic_shared) as u32,
                waits: #waits,
                alone: #alone,
                warpgroups: #warpgroups,
                emulate: Self::emulate,
            };

            unsafe fn emulate(arguments: &[::cuda_std::emulator::Argument]) {
                // SAFETY: the launch contract is the kernel's own.
                unsafe { #name(#(#from_arguments),*) }
            }

            /// Starts the kernel on `launcher`.
            ///
            /// # Errors
            ///
            /// Those of [`Launcher::launch`](::cuda_std::Launcher::launch).
            ///
            /// # Safety
            ///
            /// The slices are memory of this device that lives until the launch is done, and the kernel's own `# Safety`
            /// section holds.
            pub unsafe fn run(
                launcher: &dyn ::cuda_std::Launcher,
                launch: ::cuda_std::Launch,
                #(#run_params),*
            ) -> ::core::result::Result<(), ::cuda_std::LaunchError> {
                // SAFETY: types fit by this signature; the rest is the caller's promise.
                unsafe { launcher.launch(Self::ENTRY, launch, &[#(#run_args),*]) }
            }
        }
    })
}

fn parameter(ty: &Type) -> syn::Result<Parameter> {
    let expected = "expected Global<T>, Disjoint<T>, Atomics<T>, u32, i32, u64 or f32";
    // A `macro_rules!` fragment arrives in an invisible group.
    let ty = if let Type::Group(group) = ty { &*group.elem } else { ty };
    let Type::Path(path) = ty else {
        return Err(Error::new(ty.span(), expected));
    };
    let last = path.path.segments.last().expect("a path has a segment");
    match (last.ident.to_string().as_str(), &last.arguments) {
        ("Global" | "Disjoint" | "Atomics", PathArguments::AngleBracketed(arguments)) => match arguments.args.first() {
            Some(GenericArgument::Type(element)) => {
                Ok(Parameter::Slice { wrapper: last.ident.clone(), element: Box::new(element.clone()) })
            }
            _ => Err(Error::new(ty.span(), expected)),
        },
        ("u32" | "i32" | "u64" | "f32", PathArguments::None) => Ok(Parameter::Scalar(Box::new(ty.clone()))),
        _ => Err(Error::new(ty.span(), expected)),
    }
}
